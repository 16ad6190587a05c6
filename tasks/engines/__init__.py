"""The heavy work: TRL's trainer, the sampling engines, the child process. Only here: trl and vllm."""
