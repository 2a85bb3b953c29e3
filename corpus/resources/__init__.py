"""Gene and ortholog tables, and the script that builds them from published wheels."""
