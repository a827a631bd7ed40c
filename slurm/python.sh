# shellcheck shell=bash disable=SC2034,SC2154 # both names belong to who sources it
# Sourced by the scripts beside it: sets `python`, the program that runs what is in the repository's folder `home`.
if [[ -n ${SOME_PYTHON:-} ]]; then
	python=$SOME_PYTHON
else
	# shellcheck source=/dev/null
	[[ ! -r $home/.venv/bin/activate ]] || source "$home/.venv/bin/activate"
	python=python3
fi
