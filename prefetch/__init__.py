"""Bytes: from storage into host buffers. Knows no model and no device."""
