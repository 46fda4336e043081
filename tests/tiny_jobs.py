"""Whole jobs in seconds, for the tests that start from a config of `configs/`."""

TINY = {
  "model.width": 4,
  "model.depth": 1,
  "base.num_steps": 30,
  "base.batch_size": 8,
  "base.warmup_steps": 2,
  "base.eval_every_steps": 30,
  "proposals.mix": "base:1,tta+threshold:3",
  "judge.num_bootstrap": 20,
  "mine.batch_size": 8,
  "mine.num_shards": 2,
  "mine.pairs_per_image": 2,
  "finetune.num_steps": 3,
  "finetune.batch_size": 8,
  "finetune.eval_every_steps": 3,
  "evaluate.batch_size": 8,
  "judge.gate.action": "off",
}


def tiny(config, **changes):
  with config.unlocked():
    config.update_from_flattened_dict(TINY | {k.replace("__", "."): v for k, v in changes.items()})
  return config
