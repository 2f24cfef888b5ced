#!/bin/bash
# Trains on the nodes of a Slurm job, two here: Ray's head on the first, Ray on the others, then the driver.
#
#   sbatch tools/launch/slurm.sh examples/run_sft.py cluster.num_nodes=2 cluster.gpus_per_node=8 KEY=VALUE ...
#
# This directory, the model and checkpointing.checkpoint_dir have to be at the same place on all nodes. The exit code is
# the driver's. Before the job's time is over, Slurm sends SIGTERM, and the driver saves and stops.
#
# What was run: the whole script, from its first line to its last, on network namespaces of one machine, with an `srun`
# that enters them (tests/cluster/test_launch.py). What was not: sbatch, Slurm's own srun, GPUs.

#SBATCH --job-name=nemo-rl-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --output=slurm-%j.out
# #SBATCH --account=ACCOUNT
# #SBATCH --partition=PARTITION

set -euo pipefail

run=${NRL_RUN-uv run}               # how Python and Ray are started; empty: as they are on the PATH
interface=${NRL_INTERFACE-}         # the network interface to train over; empty: that of the first address
port=${NRL_RAY_PORT-6379}
token_directory=${NRL_TOKEN_DIR-$HOME}  # seen by all nodes, and by nobody else
start_seconds=${NRL_START_SECONDS-300}

# One command on one node, beside whatever else the job runs there: "${on[@]}" NODE COMMAND ...
on=(srun --overlap --nodes=1 --ntasks=1 --nodelist)

address_of() {
    if [ -n "$interface" ]; then
        "${on[@]}" "$1" ip -4 -o addr show dev "$interface" | awk '{split($4, parts, "/"); print parts[1]; exit}'
    else
        "${on[@]}" "$1" hostname -I | awk '{print $1; exit}'
    fi
}

# Whoever has the token may run code on the nodes. It travels as a file that only this user may read.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN_PATH=$(umask 077 && mktemp "$token_directory/.nrl-ray-token-XXXXXXXX")
export RAY_AUTH_TOKEN_PATH
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

steps=()
finish() {
    trap - EXIT
    [ ${#steps[@]} -eq 0 ] || kill -TERM "${steps[@]}" 2> /dev/null || true
    wait
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address=$(address_of "${nodes[0]}")

# shellcheck disable=SC2086  # $run is words
start_ray() { # NODE ADDRESS ARGUMENTS ...
    local node=$1 address=$2
    shift 2
    "${on[@]}" "$node" $run ray start "$@" --node-ip-address="$address" --block &
    steps+=($!)
}

start_ray "${nodes[0]}" "$head_address" --head --port="$port" --include-dashboard=false
"${on[@]}" "${nodes[0]}" timeout "$start_seconds" bash -c \
    "until (exec 3<> /dev/tcp/$head_address/$port) 2> /dev/null; do sleep 1; done"
for node in "${nodes[@]:1}"; do
    start_ray "$node" "$(address_of "$node")" --address="$head_address:$port"
done

export RAY_ADDRESS=$head_address:$port
# shellcheck disable=SC2086
"${on[@]}" "${nodes[0]}" timeout "$start_seconds" $run python -c "
import sys, time, ray
ray.init(log_to_driver=False)
while sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(1)
" "${#nodes[@]}"

# shellcheck disable=SC2086
"${on[@]}" "${nodes[0]}" $run python "$@" &
driver=$!
steps+=("$driver")
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do # a signal ended the wait, and not the driver
    code=0
    wait "$driver" || code=$?
done
exit "$code"
