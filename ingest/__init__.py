"""From source files to a corpus: quality control, gene mapping, ranking and publication, spread by Ray Data."""
