#!/usr/bin/env bash
# Finds the header of Catch2 2.x, which the C++ tests need, and prints the folder that holds it.
#   scripts/catch2.sh            status 1, and nothing printed, where it is missing
#   scripts/catch2.sh --install  installs Debian's package where that is allowed, else says how
# CATCH2_INCLUDE_DIR names a folder to look in before the usual ones.
set -euo pipefail

find_header() {
  local folder
  for folder in "${CATCH2_INCLUDE_DIR:-}" /usr/include /usr/local/include; do
    if [ -n "$folder" ] && [ -f "$folder/catch2/catch.hpp" ]; then
      echo "$folder"
      return 0
    fi
  done
  return 1
}

find_header && exit 0
[ "${1:-}" = --install ] || exit 1

if ! command -v apt-get >/dev/null; then
  echo "Catch2 2.13 (catch2/catch.hpp) is missing. Install its header and set CATCH2_INCLUDE_DIR." >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  as_root=()
elif sudo -n true 2>/dev/null; then
  as_root=(sudo -n)
else
  echo "Catch2 2.13 (catch2/catch.hpp) is missing. Type: sudo apt-get install -y catch2" >&2
  exit 1
fi
install() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y catch2 >&2; }
install || { "${as_root[@]}" apt-get update >&2 && install; }
find_header || {
  echo "The package catch2 is installed, but there is no catch2/catch.hpp. Set CATCH2_INCLUDE_DIR." >&2
  exit 1
}
