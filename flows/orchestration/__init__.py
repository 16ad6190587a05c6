"""Prefect's side: the form, deployments, server and worker, limits, reviews by a person, lost runs."""
