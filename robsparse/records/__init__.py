"""What finished jobs write: result rows, records of evaluations, names of columns, provenance.

Imports base and schema and no torch.
"""
