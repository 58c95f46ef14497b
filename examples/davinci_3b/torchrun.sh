#!/usr/bin/env bash
# Train on one node or on many: start this on every node, with the same arguments and variables.
#
#   one node, all its GPUs       examples/davinci_3b/torchrun.sh examples/davinci_3b/config.yaml
#   eight nodes, on each         NNODES=8 HEAD=node01 examples/davinci_3b/torchrun.sh examples/davinci_3b/config.yaml
#   one node without a GPU       DEVICE=cpu RANKS_PER_NODE=2 examples/davinci_3b/torchrun.sh CONFIG.yaml
#
# After the configuration come settings that win over the file: train.stop_after_steps=20 run.directory=runs/try
#
# Start it again after a failure, in the same way: the run goes on from the newest checkpoint that verifies.
#
# SIGTERM, SIGUSR1 or Ctrl-C ask it to end: it saves at the next step boundary and ends with 75. A second one ends it at
# once.
#
# It ends with 0; with 75 when it was asked to end and has saved; with 2 when there is something for you to mend, and the
# screen says what; otherwise with the exit code of the rank that failed first (docs/reference/errors.md).
set -euo pipefail

if (($# == 0)); then
  echo "usage: [NAME=VALUE ...] $0 CONFIG.yaml [key=value ...]   (the names are explained in this file)" >&2
  exit 2
fi

# ---- What runs where ----------------------------------------------------------------------------------------------

NNODES=${NNODES:-1}                      # nodes of the run; each starts this script once
RANKS_PER_NODE=${RANKS_PER_NODE:-gpu}    # ranks on each node: a number, or `gpu` for one a GPU
MAX_RESTARTS=${MAX_RESTARTS:-0}          # how often ranks are started again on these nodes when one fails
DEVICE=${DEVICE:-cuda}                   # `cuda` makes a rank that finds no GPU say so; `auto` would take its CPU

# The interpreter that has megatron_davinci: that of the checkout where there is one, otherwise (in a container) python3.
if [[ -z ${PYTHON:-} ]]; then
  root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
  PYTHON=$root/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi

# ---- Where the nodes meet -----------------------------------------------------------------------------------------

# The rendezvous is a small TCP server that torchrun opens on one of the nodes, HEAD. Every node reports there, learns
# its ranks, and the ranks find each other through it. HEAD is the name or address of that node as *the others* reach
# it, and PORT must be open between them and free on HEAD.
HEAD=${HEAD:-}
PORT=${PORT:-29500}

# Nodes with the same id belong together. Two runs that share a HEAD and PORT need two ids; a run that is started again
# is best given a new one, so that what is left of the old start cannot join it.
RUN_ID=${RUN_ID:-davinci}

# How many seconds a node waits for HEAD and for the other nodes, before it says who is missing and ends.
JOIN_TIMEOUT=${JOIN_TIMEOUT:-300}

if [[ $NNODES != 1 && -z $HEAD ]]; then
  echo "error: NNODES is $NNODES and HEAD is not set." >&2
  echo "  do:       set HEAD to the name of one of the nodes, the same on all of them" >&2
  exit 2
fi

# ---- The network --------------------------------------------------------------------------------------------------

# NCCL (GPU to GPU) and gloo (CPU to CPU) each pick a network interface to begin their talks on. On nodes with several
# they may pick one that the others cannot reach, and the run then waits until it times out. `ip -br address` lists
# them; name the one that the nodes share: INTERFACE=ib0, or bond0, eth0, lo. It must have that name on every node.
if [[ -n ${INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
fi

# The address under which *this* node is reached by the others. torchrun takes the machine's full name; set LOCAL_ADDR
# where that name does not resolve on the other nodes. It is the one variable that differs from node to node.
LOCAL_ADDR=${LOCAL_ADDR:-}

# NCCL finds InfiniBand and NVLink by itself. These are read by NCCL, not by us; set one when something is wrong:
#   NCCL_DEBUG=INFO              says which interfaces, adapters and algorithms it took ("NET/IB" is InfiniBand,
#                                "NET/Socket" is TCP, which on a cluster with InfiniBand means that it was not found)
#   NCCL_IB_HCA=mlx5_0,mlx5_1    uses these InfiniBand adapters only: leaves out one for storage, say
#   NCCL_IB_DISABLE=1            uses TCP: to find out whether InfiniBand is what fails; slow
#   NCCL_P2P_DISABLE=1           no direct copies between GPUs of a node: to find out whether they are what fails; slow
# A rank that waits in a collective longer than parallel.timeout_seconds ends, and with it the run.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# ---- Start --------------------------------------------------------------------------------------------------------

# megatron_davinci.train.agent is torchrun with clearer errors. `torchrun` with the same arguments does the same.
torchrun=(
  "$PYTHON" -m megatron_davinci.train.agent
  --nnodes "$NNODES"
  --nproc-per-node "$RANKS_PER_NODE"
  # How often a rank that dies has all ranks started again. With 0 it ends this start on every node, and starting again
  # is left to whoever started this script (slurm.sbatch requeues): then a node that is broken is replaced, where
  # torchrun could only use it again. What another start would meet again (codes 2, 3, 6) and what was asked for (75)
  # is not started again.
  --max-restarts "$MAX_RESTARTS"
)
if [[ $NNODES == 1 ]]; then
  torchrun+=(--standalone) # a free port of this machine, reached from this machine only
else
  torchrun+=(
    --rdzv-backend c10d
    --rdzv-endpoint "$HEAD:$PORT"
    --rdzv-id "$RUN_ID"
    # join_timeout: for the other nodes. read_timeout: for HEAD's server, which may start later than this node.
    --rdzv-conf "join_timeout=$JOIN_TIMEOUT,read_timeout=$JOIN_TIMEOUT"
  )
  if [[ -n $LOCAL_ADDR ]]; then
    torchrun+=(--local-addr "$LOCAL_ADDR")
  fi
fi

exec "${torchrun[@]}" -m megatron_davinci.train "$@" "parallel.device=$DEVICE"
