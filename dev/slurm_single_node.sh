#!/usr/bin/env bash
# A real Slurm on one machine, to try jobs, requeues and time limits on: dev/slurm_single_node.sh [up|down|status]
#
# For Debian and Ubuntu (slurm-wlm and munge from the distribution), as root, with or without systemd. CPUS is how many
# the one node says it has (at least 2; more than there are is allowed, for this is to test jobs, not their speed), GPUS
# how many of its NVIDIA GPUs it offers. `down` stops the daemons and leaves the packages. An /etc/slurm/slurm.conf that
# this script did not write is left alone, and is an error.
set -euo pipefail

conf=/etc/slurm/slurm.conf
mark="# written by dev/slurm_single_node.sh"
state=/var/lib/slurm/single_node
host=$(hostname -s)

fail() { echo "slurm_single_node: $*" >&2; exit 1; }

install_packages() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || fail "no apt-get here: install Slurm and munge by the means of this system"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

write_config() {
    if [ -e $conf ] && ! grep -qF "$mark" $conf; then
        fail "$conf is there and is not this script's; move it away first"
    fi
    local real memory cpus=${CPUS:-0} gpus=${GPUS:-0} gres=""
    real=$(nproc)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    [ "$cpus" -ge 2 ] || cpus=$((real > 2 ? real : 2))
    : >/etc/slurm/gres.conf
    if [ "$gpus" -gt 0 ]; then
        gres=" Gres=gpu:$gpus"
        echo "Name=gpu File=/dev/nvidia[0-$((gpus - 1))]" >/etc/slurm/gres.conf
        [ "$gpus" -gt 1 ] || echo "Name=gpu File=/dev/nvidia0" >/etc/slurm/gres.conf
    fi
    cat >$conf <<END
$mark
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmUser=slurm
AuthType=auth/munge
# A requeued job waits until its old credential is worthless: 2 minutes by default.
AuthInfo=cred_expire=15
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
# No control groups: they need rights that a container often lacks.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
$([ -z "$gres" ] || echo GresTypes=gpu)
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory$gres
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
}

running() { pidof "$1" >/dev/null; }

wait_for() { # a command, for up to 20 seconds
    for _ in $(seq 40); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    fail "'$*' did not come true in 20 s; look into /var/log/slurm"
}

idle() { [ "$(sinfo --noheader --format %t)" = idle ]; }

up() {
    [ "$(id -u)" = 0 ] || fail "must run as root"
    install_packages
    write_config
    mkdir -p $state/ctld $state/d /run/munge /var/log/slurm
    chown slurm: $state $state/ctld /var/log/slurm
    chown munge: /run/munge /etc/munge /etc/munge/munge.key
    # Daemons are started as they are, for containers have no systemd.
    running munged || runuser -u munge -- munged
    wait_for munge -n
    running slurmctld || slurmctld
    running slurmd || slurmd
    wait_for scontrol ping
    wait_for sinfo
    scontrol reconfigure
    idle || scontrol update "NodeName=$host" State=RESUME 2>/dev/null || true
    wait_for idle
    status
}

down() {
    for daemon in slurmd slurmctld munged; do
        for pid in $(pidof $daemon || true); do kill "$pid"; done
    done
}

status() {
    scontrol --version
    sinfo --format "%P %D node(s), %c CPUs, %m MB, gres %G: %T"
    squeue
}

case ${1:-up} in
    up) up ;;
    down) down ;;
    status) status ;;
    *) sed -n 2p "$0" >&2; exit 2 ;;
esac
