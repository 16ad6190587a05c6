"""Prefect: form, deployments, server and worker, concurrency limits, reviews, lost flow runs."""
