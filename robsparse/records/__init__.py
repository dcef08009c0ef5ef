"""Files of finished jobs: result rows, records, names of columns, provenance.

Imports base and schema, and no torch.
"""
