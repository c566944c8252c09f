"""The outside world: object stores, Ray clusters, metrics, the console. Imports nothing of ours."""
