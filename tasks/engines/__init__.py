"""TRL's trainer, the sampling engines and the child process. Only this package imports trl and vllm."""
