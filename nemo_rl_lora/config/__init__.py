"""Every user-facing configuration class, a file per section, and the loader that fills them."""
