"""Masked-gene pretraining and fine-tuning: BERT weights that stock transformers loads, run without padding."""
