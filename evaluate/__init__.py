"""Questions to a trained model: embeddings, classification, in silico perturbation and its statistics, reports."""
