"""The demo's text: documentation on every machine, facts planted in it, and questions about them."""
