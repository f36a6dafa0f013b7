"""SITE (arXiv 2507.20906): soft head selection."""
