"""Admission by memory: which waiting requests the KV pool can hold until they end."""
