#!/usr/bin/env bash
# Prints how many compilers may run at once: the cores, but at most one per 2 GiB of free memory
# (a translation unit that includes LibTorch takes about that much).
set -euo pipefail

cores=$(nproc)
free=$(awk '/^MemAvailable:/ { print int($2 / (2 * 1024 * 1024)) }' /proc/meminfo)
if [ -r /sys/fs/cgroup/memory.max ] && [ -r /sys/fs/cgroup/memory.current ]; then
  limit=$(cat /sys/fs/cgroup/memory.max)
  if [ "$limit" != max ]; then
    inside=$(((limit - $(cat /sys/fs/cgroup/memory.current)) / (2 * 1024 * 1024 * 1024)))
    free=$((inside < free ? inside : free))
  fi
fi
jobs=$((free < cores ? free : cores))
echo $((jobs > 1 ? jobs : 1))
