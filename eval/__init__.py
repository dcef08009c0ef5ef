"""Attacks, one file each. An attack gets a plain torch model and images; it uses no method."""
