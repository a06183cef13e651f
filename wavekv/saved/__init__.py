"""Saved contexts as files: a directory that is a Zarr group, Arrow tables and a manifest.

Knows names, arrays, tables and checksums, and nothing of layers or models (`docs/format.md`).
"""
