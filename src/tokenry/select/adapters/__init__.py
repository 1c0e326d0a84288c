"""adapters: select methods for other libraries."""
