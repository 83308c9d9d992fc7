"""Any optax transformation as a torch optimizer."""

import copy
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import hina_optax as ho
from hina_optax.torch_bridge import HinaAdaptive, OptaxOptimizer
from tests.torch_bridge.models import assert_same, dense_model, lora_model, loss_of, train, trained


@pytest.fixture(autouse=True)
def standard_promotion():
  # optax's own transformations mix dtypes.
  with jax.numpy_dtype_promotion("standard"):
    yield


def injected(learning_rate=1e-3, **options):
  return optax.inject_hyperparams(optax.adamw)(
    learning_rate=learning_rate, weight_decay=0.1, **options)


# At the learning rate of a LoRA: optax computes 1 - 0.999^t in fp32, which makes each step 6e-6 too
# long or short, at 1e-3 1.3e-6 after a hundred steps. The next test has 64 bits and no such error.
@pytest.mark.parametrize("make", [dense_model, lora_model])
@pytest.mark.parametrize("tx", [optax.adamw(1e-4, weight_decay=0.1), injected(1e-4)],
                         ids=["plain", "injected"])
def test_adamw_is_torch_s_adamw(make, tx):
  ours, theirs = make(), make()
  train(ours, OptaxOptimizer(trained(ours), tx), 100)
  train(theirs, torch.optim.AdamW(trained(theirs), lr=1e-4, weight_decay=0.1), 100)
  assert_same(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [dense_model, lora_model])
def test_adamw_in_64_bits_is_torch_s_adamw_to_the_last_digits(make):
  ours, theirs = make(dtype=torch.float64), make(dtype=torch.float64)
  with jax.enable_x64(True):
    train(ours, OptaxOptimizer(trained(ours), optax.adamw(1e-3, weight_decay=0.1)), 100)
  train(theirs, torch.optim.AdamW(trained(theirs), lr=1e-3, weight_decay=0.1), 100)
  assert_same(ours, theirs, rtol=0, atol=1e-12)


def test_64_bits_without_x64_are_refused():
  with pytest.raises(TypeError, match=r"'0'.*float64.*jax_enable_x64"):
    OptaxOptimizer(dense_model(dtype=torch.float64).parameters(), optax.sgd(0.1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_take_the_step_that_jax_takes(dtype):
  model = dense_model(dtype=dtype)
  tx = ho.with_rounded_updates(ho.with_state_dtype(optax.adamw(1e-2), "bfloat16"))
  kind = {torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16}[dtype]
  params = [jnp.asarray(p.detach().float().numpy(), kind) for p in model.parameters()]
  # The same tree as the bridge's: the rounding noise follows the places of the leaves.
  tree = dict(zip("0123", params))
  state = tx.init(tree)
  optimizer = OptaxOptimizer(model.parameters(), tx)
  update = jax.jit(tx.update)
  for _ in range(3):
    optimizer.zero_grad()
    loss_of(model).backward()
    grads = {
      k: jnp.asarray(p.grad.float().numpy(), kind) for k, p in zip("0123", model.parameters())}
    updates, state = update(grads, state, tree)
    tree = optax.apply_updates(tree, updates)
    optimizer.step()
    for p, expected in zip(model.parameters(), tree.values()):
      assert p.dtype == dtype
      np.testing.assert_array_equal(p.detach().float().numpy(), np.asarray(expected, np.float32))


def test_groups_have_numbers_of_their_own_and_schedulers_do_not_compile():
  def groups(model):
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 3e-3, "weight_decay": 0.0}, {"params": rest}]

  ours, theirs = dense_model(), dense_model()
  optimizer = OptaxOptimizer(groups(ours), injected(), lr=1e-3)
  other = torch.optim.AdamW(groups(theirs), lr=1e-3, weight_decay=0.1)
  assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(3e-3, 0.0),
                                                                           (1e-3, 0.1)]
  for o, m in ((optimizer, ours), (other, theirs)):
    train(m, o, 30, torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)))
    o.param_groups[1]["weight_decay"] = 0.5
    train(m, o, 10)
  assert_same(ours, theirs, rtol=1e-6, atol=1e-6)
  assert optimizer.compilations() == 2  # one a group


def test_without_an_injected_rate_lr_is_a_factor():
  ours, theirs = dense_model(), dense_model()
  optimizer = OptaxOptimizer(ours.parameters(), optax.sgd(1.0))
  assert optimizer.param_groups[0]["lr"] == 1.0
  other = torch.optim.SGD(theirs.parameters(), lr=1.0)
  for o, m in ((optimizer, ours), (other, theirs)):
    train(m, o, 5, torch.optim.lr_scheduler.StepLR(o, 1, 0.1))
  assert_same(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_scheduled_number_stays_with_its_schedule():
  tx = optax.inject_hyperparams(optax.sgd)(optax.exponential_decay(1.0, 1, 0.5))
  weight = torch.nn.Parameter(torch.tensor([8.0]))
  optimizer = OptaxOptimizer([weight], tx)
  for _ in range(3):
    weight.grad = torch.tensor([1.0])
    optimizer.step()
  assert weight.item() == 8.0 - 1.0 - 0.5 - 0.25


@pytest.mark.parametrize(
  "tx",
  [optax.adamw(1e-2), optax.sgd(1e-2, momentum=0.9),
   optax.chain(optax.clip_by_global_norm(0.5), ho.hina_adaptive(1e-2))],
  ids=["adamw", "momentum", "chain-with-ours"])
def test_a_parameter_without_a_gradient_keeps_value_and_state(tx):
  a, b = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((4, 4), (3, 5)))
  optimizer = OptaxOptimizer([a, b], tx)
  for step in range(4):
    a.grad = torch.randn(4, 4)
    b.grad = torch.randn(3, 5) if step == 0 else None
    before = a.detach().clone(), b.detach().clone(), saved_state(optimizer, "1")
    optimizer.step()
    assert not torch.equal(a, before[0])
    after = saved_state(optimizer, "1")
    if step:
      assert torch.equal(b, before[1])
      assert after
      assert all(torch.equal(after[k], before[2][k]) for k in after)


def saved_state(optimizer, name):
  """Pieces of state that carry the parameter's name."""
  groups = optimizer.state_dict()["state"]["hina_optax"]["groups"]
  arrays = groups[0][0]["arrays"] if groups[0] else {}
  return {k: v for k, v in arrays.items() if f"['{name}']" in k}


def test_frozen_parameters_cost_nothing_and_may_be_thawed():
  model = dense_model()
  first, *rest = model.parameters()
  first.requires_grad_(False)
  optimizer = OptaxOptimizer(model.parameters(), optax.adamw(1e-2))
  start = first.detach().clone()
  train(model, optimizer, 3)
  assert torch.equal(first, start)
  arrays = optimizer.state_dict()["state"]["hina_optax"]["groups"][0][0]["arrays"]
  moments = sum(x.numel() for x in arrays.values() if x.ndim)
  assert moments == 2 * sum(p.numel() for p in rest)

  first.requires_grad_(True)
  lone = torch.nn.Parameter(start.clone())
  fresh = OptaxOptimizer([lone], optax.adamw(1e-2))
  optimizer.zero_grad()
  loss_of(model).backward()
  lone.grad = first.grad.clone()
  optimizer.step()
  fresh.step()
  assert torch.equal(first, lone)


def test_writes_in_place_keep_storage_views_and_hooks():
  model = dense_model()
  optimizer = OptaxOptimizer(model.parameters(), optax.adamw(1e-2))
  weight = model[0].weight
  view, pointer, seen = weight.detach().view(-1), weight.data_ptr(), []
  weight.register_hook(lambda g: seen.append(g.shape))
  version = weight._version
  train(model, optimizer, 3)
  assert weight.data_ptr() == pointer
  assert torch.equal(view, weight.detach().view(-1))
  assert len(seen) == 3
  assert weight._version > version  # autograd knows that it was written


def test_no_second_copy_of_the_parameters_is_held():
  shape = (61, 67)  # of no other test
  weight = torch.nn.Parameter(torch.randn(*shape))
  optimizer = OptaxOptimizer([weight], optax.sgd(1e-2))
  weight.grad = torch.randn(*shape)
  optimizer.step()
  gc.collect()
  shared = [x for x in jax.live_arrays() if x.shape == shape]
  assert [x.unsafe_buffer_pointer() for x in shared] in ([], [weight.data_ptr()])


def test_strided_unaligned_moved_and_replaced_tensors():
  flat = torch.randn(1000)
  unaligned = torch.nn.Parameter(flat[1:13].view(3, 4))
  columns = torch.nn.Parameter(torch.randn(4, 3).t())
  channels = torch.nn.Parameter(
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
  plain = torch.nn.Parameter(torch.randn(3, 4))
  params = [unaligned, columns, channels, plain]
  twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
  ours, theirs = OptaxOptimizer(params, optax.sgd(0.1)), torch.optim.SGD(twins, lr=0.1)
  for step in range(4):
    if step == 2:
      for p in (columns, plain, twins[1], twins[3]):
        p.data = torch.ones(3, 4)
    for p, q in zip(params, twins):
      p.grad = torch.randn_like(p)
      q.grad = p.grad.clone()
    ours.step()
    theirs.step()
    for p, q in zip(params, twins):
      torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
  assert torch.equal(flat[1:13], unaligned.detach().view(-1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 5), (5, 1), (1, 1, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sides_of_one_and_of_none(shape, dtype):
  p = torch.nn.Parameter(torch.full(shape, 2.0, dtype=dtype))
  p.grad = torch.ones(shape, dtype=dtype)
  OptaxOptimizer([p], optax.sgd(0.5)).step()
  assert torch.equal(p, torch.full(shape, 1.5, dtype=dtype))


def test_state_that_begins_as_the_parameters_is_not_their_memory():
  weight = torch.nn.Parameter(torch.randn(8, 8))
  start = weight.detach().clone()
  tx = optax.GradientTransformation(lambda p: p, lambda u, s, p: (u, s))
  optimizer = OptaxOptimizer([weight], optax.chain(tx, optax.sgd(0.1)))
  for _ in range(3):
    weight.grad = torch.ones(8, 8)
    optimizer.step()
  (array,) = saved_state(optimizer, "0").values()
  assert torch.equal(array, start)


def test_state_that_becomes_the_parameters_is_not_their_memory():
  weight = torch.nn.Parameter(torch.randn(8, 8))
  before = optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p), lambda u, s, p: (u, p))
  optimizer = OptaxOptimizer([weight], optax.chain(before, optax.sgd(0.1)))
  for _ in range(3):
    expected = weight.detach().clone()
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    (array,) = saved_state(optimizer, "0").values()
    assert torch.equal(array, expected)


def test_a_closure_is_called_with_gradients_on():
  model = dense_model()
  optimizer = OptaxOptimizer(model.parameters(), optax.sgd(0.1))

  def closure():
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss

  first = optimizer.step(closure)
  assert optimizer.step(closure) < first


def test_the_loss_of_a_closure_reaches_transformations_that_ask_for_it():
  weight = torch.nn.Parameter(torch.ones(3))
  tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(0.5, patience=1, atol=1e-3))
  optimizer = OptaxOptimizer([weight], tx)
  losses = iter([1.0, torch.tensor(1.0), 1.0, 1.0])

  def closure():
    weight.grad = torch.ones(3)
    return next(losses)

  params = {"0": jnp.ones(3)}
  state = tx.init(params)
  for _ in range(4):
    optimizer.step(closure)
    updates, state = tx.update({"0": jnp.ones(3)}, state, params, value=jnp.float32(1.0))
    params = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(weight.detach().numpy(), np.asarray(params["0"]))
  assert -1 < weight[0] < 0  # four steps of 1 would end at -3


def test_equal_names_are_refused():
  a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
  with pytest.raises(ValueError, match="named 'w'"):
    OptaxOptimizer([("w", a), ("w", b)], optax.sgd(0.1))


def test_groups_may_be_added_while_training():
  a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
  optimizer = OptaxOptimizer([a], injected())
  a.grad = torch.ones(3)
  optimizer.step()
  optimizer.add_param_group({"params": [b], "lr": 1e-2})
  a.grad, b.grad = torch.ones(3), torch.ones(3)
  optimizer.step()
  assert optimizer.param_groups[1]["lr"] == 1e-2
  torch.testing.assert_close(b.detach(), torch.full((3,), 1 - 1e-2 - 1e-3))


def test_step_hooks_are_called():
  weight = torch.nn.Parameter(torch.ones(3))
  optimizer, seen = OptaxOptimizer([weight], optax.sgd(0.1)), []
  optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
  optimizer.register_step_post_hook(lambda *args: seen.append("after"))
  weight.grad = torch.ones(3)
  optimizer.step()
  assert seen == ["before", "after"]


def test_bad_input_is_named_and_changes_nothing():
  weight, plain = torch.nn.Parameter(torch.ones(3)), optax.adamw(1e-3)
  for make, error, words in [
    (lambda: OptaxOptimizer([weight], "adamw"), TypeError, "tx must be an optax transformation"),
    (lambda: OptaxOptimizer([weight], plain, maximize=True), ValueError, "negate the loss"),
    (lambda: OptaxOptimizer([{"params": [weight], "maximize": True}], plain), ValueError,
     "negate the loss"),
    (lambda: OptaxOptimizer([weight], plain, weight_decay=0.1), ValueError,
     "weight_decay.*inject_hyperparams"),
    (lambda: OptaxOptimizer([{"params": [weight], "betas": (0.9, 0.9)}], plain), ValueError,
     "betas.*inject_hyperparams"),
    (lambda: OptaxOptimizer([torch.ones(3, dtype=torch.complex64)], plain), TypeError,
     "'0' is torch.complex64"),
    (lambda: OptaxOptimizer([torch.nn.Parameter(torch.ones(3, device="meta"))], plain).step(),
     ValueError, "'meta', which JAX cannot use"),
  ]:
    with pytest.raises(error, match=words):
      make()


def test_a_refused_group_leaves_the_optimizer_as_it_was():
  a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
  optimizer = OptaxOptimizer([a], optax.sgd(0.1))
  with pytest.raises(ValueError, match="momentum"):
    optimizer.add_param_group({"params": [b], "momentum": 0.9})
  assert len(optimizer.param_groups) == 1
  a.grad = torch.ones(3)
  optimizer.step()
  torch.testing.assert_close(a.detach(), torch.full((3,), 0.9))


def test_sparse_gradients_are_refused_before_anything_changes():
  table = torch.nn.Embedding(4, 2, sparse=True)
  weight = torch.nn.Parameter(torch.ones(2))
  optimizer = OptaxOptimizer(
    [("weight", weight), ("table", table.weight)], optax.sgd(0.1))
  (table(torch.tensor([1])) * weight).sum().backward()
  with pytest.raises(ValueError, match=r"'table' has a sparse gradient.*sparse=False"):
    optimizer.step()
  assert torch.equal(weight.detach(), torch.ones(2))


def test_copies_are_refused():
  optimizer = OptaxOptimizer([torch.nn.Parameter(torch.ones(3))], optax.sgd(0.1))
  with pytest.raises(TypeError, match="state_dict"):
    copy.deepcopy(optimizer)


def test_names_are_the_paths_that_masks_see():
  model = dense_model()
  seen = []

  def mask(tree):
    seen.append(list(tree))
    return {name: name.endswith("weight") for name in tree}

  optimizer = OptaxOptimizer(model.named_parameters(), optax.masked(optax.set_to_zero(), mask))
  train(model, optimizer, 1)
  assert ["0.weight", "0.bias", "2.weight", "2.bias"] in seen


def test_other_threads_may_take_the_step():
  import threading

  ours, theirs = dense_model(), dense_model()
  thread = threading.Thread(
    target=lambda: train(ours, HinaAdaptive(ours.parameters(), lr=1e-2), 2))
  thread.start()
  thread.join()
  train(theirs, HinaAdaptive(theirs.parameters(), lr=1e-2), 2)
  assert_same(ours, theirs)


def test_the_representation_is_torch_s():
  optimizer = OptaxOptimizer([torch.nn.Parameter(torch.ones(3))], injected())
  assert re.search(r"OptaxOptimizer \(\nParameter Group 0", repr(optimizer))
