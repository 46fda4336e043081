"""The losses: pure functions of logits, masks and margins.

    from rndpo_jax import losses
    loss, metrics = losses.rn_dpo_loss(policy_logits, reference_logits, chosen, rejected, beta=10.0)

Importing this loads jax, numpy and chex alone.
"""

from rndpo_jax.losses.margins import margin_and_size as margin_and_size
from rndpo_jax.losses.margins import pair_log_prob as pair_log_prob
from rndpo_jax.losses.margins import pair_margin as pair_margin
from rndpo_jax.losses.margins import region_size as region_size
from rndpo_jax.losses.preference import dpo_loss as dpo_loss
from rndpo_jax.losses.preference import preference_loss as preference_loss
from rndpo_jax.losses.preference import rn_dpo_loss as rn_dpo_loss
from rndpo_jax.losses.segmentation import cross_entropy as cross_entropy
from rndpo_jax.losses.segmentation import soft_dice_loss as soft_dice_loss
from rndpo_jax.losses.segmentation import supervised_loss as supervised_loss
