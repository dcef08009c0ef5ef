"""Everything that imports torchvision or robustbench, with a repair for each of the two.

No other package imports them directly. Imports base only.
"""
