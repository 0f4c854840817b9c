#!/usr/bin/env bash
# Installs what `make wheel` made into a fresh virtual environment and tries it there.
#   scripts/test_wheel.sh wheel   make test-wheel
#   scripts/test_wheel.sh sdist   make test-sdist: pip builds it first, in a clean environment of its own
# The wheel is tried where there is neither a compiler nor nvcc on the PATH. pip gets torch from its index (some GB):
#   TORCH        a version, such as 2.13.0 (default: what pip takes)
#   SUITE        folders of tests/python to run there as well, such as "linear quantize compat module", in TEST_JOBS
#                processes (default 2)
#   WHEEL_SITE   take torch and the other packages from this site-packages folder instead, and install fp8 alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
version=$(cat VERSION)
case ${1:?wheel or sdist} in
  wheel) files=(dist/fp8-"$version"-*.whl) ;;
  sdist) files=("dist/fp8-$version.tar.gz") ;;
esac
[ -f "${files[0]}" ] || { echo "test-$1: ${files[0]} is missing, run \`make wheel\`" >&2; exit 1; }

[ "$1" = sdist ] || "$python" tests/wheel/audit.py "${files[0]}"
unset PYTHONPATH  # a clone's python/ there would pass for an installed fp8
name=$1-env${TORCH:+-$TORCH}-$("$python" -c 'import sys; print("3.%d" % sys.version_info[1])')
environment=$root/build/$name
rm -rf "$environment"
"$python" -m venv "$environment"
if [ "$1" = wheel ]; then # the tools that tests call, and no compiler among them
  mkdir "$environment/tools"
  for tool in bash sh env cat ls ln rm cp mkdir uname ldd readelf nm git dirname basename sed grep; do
    path=$(command -v "$tool") && ln -s "$path" "$environment/tools/$tool"
  done
  PATH=$environment/bin:$environment/tools
fi
pip=("$environment/bin/python" -m pip --disable-pip-version-check install --quiet)
if [ "$1" = wheel ] && [ -n "${WHEEL_SITE:-}" ]; then
  echo "$WHEEL_SITE" >"$(echo "$environment"/lib/python3*/site-packages)/borrowed.pth"
  "${pip[@]}" --no-deps "$root/${files[0]}"
else
  "${pip[@]}" "$root/${files[0]}" numpy ${TORCH:+"torch==$TORCH"}
fi

cd "$environment"  # not where a folder fp8 could be found
"$environment/bin/python" "$root/tests/wheel/smoke.py" "$root"
if [ -n "${SUITE:-}" ]; then
  # A copy without python/, so that what is imported is what was installed.
  mkdir suite
  cp -r "$root"/{tests,examples,scripts,VERSION,pyproject.toml,requirements.txt} suite
  # What tests need; torch is there, and nothing is built.
  mapfile -t needed < <(grep -vE '^(#|$|torch=|setuptools|wheel|cmake|ninja|pybind11)' "$root/requirements.txt")
  [ -n "${WHEEL_SITE:-}" ] || "${pip[@]}" "${needed[@]}"
  cd suite
  read -ra folders <<<"$SUITE"
  "$environment/bin/python" -m pytest -q -n "${TEST_JOBS:-2}" --dist loadgroup "${folders[@]/#/tests/python/}"
  cd "$environment"
fi
rm -rf "$environment"  # gigabytes; kept where something failed
