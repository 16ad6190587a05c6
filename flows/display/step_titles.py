"""What each step is called where people see it."""

TITLES = {
    "data": "load pairs",
    "model": "import policy",
    "render": "render to token ids",
    "messages": "load conversations",
    "examples": "render conversations",
    "sft": "fine-tune the model",
    "features": "measure features",
    "logps": "score responses",
    "review": "review pairs",
    "select": "select pairs",
    "sample": "sample responses",
    "candidates": "read rated candidates",
    "rate": "rate responses",
    "pair": "pair responses",
    "mix": "mix pairs",
    "train": "train policy",
    "capabilities": "measure capabilities",
    "calibrate": "calibrate the judge",
    "judge": "ask the judge",
    "evaluate": "evaluate policy",
    "test": "evaluate on the test set",
    "decide": "decide",
    "report": "report",
}
"""Task names in Prefect's timeline, and how `sera watch` names steps."""
