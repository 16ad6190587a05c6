"""Records and files in the store. Glossary:

step      one unit of work (data, train, evaluate, …). Its key is the hash of its settings and inputs.
ref       pointer to a finished step: step name, key, and digest of its files (`manifest.StepRef`).
record    a JSON file that is created once and never replaced. A step's record is `done.json`.
attempt   one execution of a step, with its own folder for files. The first to write the record wins.
part      a committed piece of an unfinished step: a shard of its rows, or a training checkpoint.
head      the promoted policy that the next round starts from.
round     one pass of the loop: review, select, sample, pair, mix, train, evaluate, decide. Counted from 0.
ledger    a round's table of all pairs and prompts: kept or dropped, at which stage, and why.
store     a local folder or S3 prefix with all steps and runs.
run       a named experiment in a store: its configuration and its rounds.
manifest  the record of a finished round: steps, metrics, decision, and the hash of the manifest before it.
"""
