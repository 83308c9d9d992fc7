"""Trains the demo's denoiser sharded over all devices, in one process or in several.

  python examples/distributed.py                     one process; on a CPU with 8 virtual devices
  python examples/distributed.py --num-processes 2   starts two on this machine, 4 devices each

On a cluster start the same command once per host, with --coordinator, --num-processes and
--process-id. On Slurm, Open MPI and Cloud TPUs --cluster is enough: JAX finds the rest. Training
continues from the last checkpoint in --output, whatever the mesh and the number of processes were.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--output", type=pathlib.Path, default=pathlib.Path("distributed_output"))
  add("--steps", type=int, default=60)
  add("--save-every", type=int, default=10, metavar="STEPS")
  add("--mesh", default="", metavar="DATAxMODEL",
      help="devices that split the batch and the parameters, and those that split the other axis "
           "of the parameters; all devices x 1 by default")
  add("--width", type=int, default=64)
  add("--depth", type=int, default=2)
  add("--batch", type=int, default=16)
  add("--learning-rate", type=float, default=2e-3)
  add("--seed", type=int, default=0)
  add("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE",
      help="option of hina_adaptive; may be repeated")
  add("--cpu-devices", type=int, default=8,
      help="virtual devices on CPUs, of all processes together")
  add("--num-processes", type=int, default=1)
  add("--process-id", type=int,
      help="number of this process; without it all processes are started on this machine")
  add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  add("--cluster", action="store_true", help="let JAX find the processes of the cluster")
  return parser.parse_args()


def start_all(count: int) -> int:
  """Starts all processes on this machine, and returns a status.

  If one process fails, the others are terminated, and its status is returned.
  """
  with socket.socket() as found:
    found.bind(("localhost", 0))
    address = f"localhost:{found.getsockname()[1]}"
  command = [sys.executable, *sys.argv, "--coordinator", address]
  running = [subprocess.Popen([*command, "--process-id", str(i)]) for i in range(count)]
  status = 0
  try:
    while running and not status:
      for process in running:
        try:
          status = status or process.wait(0.2)
          running.remove(process)
          break
        except subprocess.TimeoutExpired:
          continue
  finally:
    for process in running:
      process.terminate()
  return status


def main() -> int:
  """Joins the other processes, trains, and prints the loss."""
  args = parse()
  if args.num_processes > 1 and args.process_id is None:
    return start_all(args.num_processes)
  flag = f"--xla_force_host_platform_device_count={args.cpu_devices // args.num_processes}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  import jax

  if args.cluster:
    jax.distributed.initialize()
  elif args.num_processes > 1:
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  from latent_diffusion import sharded
  from latent_diffusion.errors import UserError

  try:
    sharded.run(args)
  except (UserError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
