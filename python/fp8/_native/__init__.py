"""The native library: loading it, and what Python adds to its operators for torch's tools.

Private. Nothing here imports the rest of the package.
"""
