"""What a finished job leaves: rows, files and provenance.

Imports base and schema and no torch.
"""
