# What a submitted job runs on the cluster's head: this program, in the interpreter that Ray itself runs in. Another
# python may come first on the PATH. Ray takes RAY_RAYLET_PID out of a job's environment: its raylet is one of our parents.
process=$$
python=
while [ -z "$python" ] && [ "${process:-0}" -gt 1 ]; do
    python=$(tr '\0' '\n' < "/proc/$process/cmdline" | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p')
    process=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status")
done
python=${python:-python}
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("plop_dist") is None)' || {
    echo "error: $python on $(hostname), in which Ray runs there, has no plop_dist; start Ray from an environment that has it." >&2
    exit 2
}
exec "$python" -m plop_dist.cli run "$1"
