"""Mean Teacher on the pixels of which the teacher is sure under dropout (Yu et al., 2019).

Here the target is the mean of the passes, and the threshold stays where the source's begins.
"""

from configs.recipes import mean_teacher


def apply(config):
  mean_teacher.apply(config)
  config.finetune.terms.consistency.max_entropy = 0.75
