"""What a corpus is: gene tables, rank value encoding, Parquet schema, manifest and object store. No Ray, no torch."""
