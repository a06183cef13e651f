"""Saved contexts in object stores: copied there and back, listed, verified, deleted.

Knows manifests and files, and nothing of what a context holds (`docs/remote.md`).
"""
