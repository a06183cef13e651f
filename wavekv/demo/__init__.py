"""The demo's text: documentation, facts planted in it, and questions about them."""
