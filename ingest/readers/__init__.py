"""One adapter per source format, all behind `ingest.formats.CountMatrix` (docs/sources.md)."""
