"""Gradient accumulation: a batch gone through in parts, for less memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_micro_batches(gradient: Callable, count: int) -> Callable:
  """The gradient of a whole batch from those of its `count` parts, one after another.

  With losses l_i that are means over weights w_i, the loss is sum_i w_i l_i / sum_i w_i, which is
  that of the whole batch; gradients likewise. w_i is the metric "weight", 1 if there is none.
  Metrics whose name starts with "num_" are added up, all others averaged as the loss is. Part i
  holds the rows i, i + count, ..., so that every device has its share of each, and has its own
  key: random augmentation and dropout are other ones than those of the whole batch.

  Args:
    gradient: `jax.value_and_grad` of a LossFn with has_aux.
    count: divides B, and B / count is shared by the devices.

  Returns:
    (params, batch, inputs) -> ((loss, metrics), grads); the batch is a tree of arrays with
    leading axis B.
  """

  def accumulated(params, batch, inputs):
    parts = jax.tree.map(
      lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
    )

    def one(total, number_and_part):
      number, part = number_and_part
      own = inputs._replace(key=jax.random.fold_in(inputs.key, number))
      (loss, aux), grads = gradient(params, part, own)
      weight = jnp.asarray(aux.pop("weight", 1.0), jnp.float32)
      total = jax.tree.map(lambda t, g: t + weight * g, total, grads)
      return total, (weight, {**aux, "loss": loss})

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (weights, aux) = jax.lax.scan(one, zeros, (jnp.arange(count), parts))
    share = weights / jnp.maximum(jnp.sum(weights), 1e-12)
    grads = jax.tree.map(lambda t: t / jnp.maximum(jnp.sum(weights), 1e-12), total)
    # A part without weight has no quantiles of its pairs: NaN, of which there is no share.
    aux = {
      name: jnp.sum(
        values if name.startswith("num_") else jnp.where(share > 0, share * values, 0.0)
      )
      for name, values in aux.items()
    }
    return (aux["loss"], aux), grads

  return accumulated
