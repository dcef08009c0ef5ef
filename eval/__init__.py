"""Attacks, one file each. They see a plain torch model and images, and know of no method."""
