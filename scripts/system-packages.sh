#!/usr/bin/env bash
# Make sure that the Debian packages behind the named commands are there.
#
#   scripts/system-packages.sh python3-venv wrk strace ...
#
# Nothing happens when all are present. As root on a machine with apt-get the missing ones are
# installed; otherwise the script says what to install and ends with 1.
set -euo pipefail

present() {
    case "$1" in
        python3-venv) python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ;;
        iproute2) command -v ip >/dev/null ;;
        nftables) command -v nft >/dev/null ;;
        lxc) command -v lxc-start >/dev/null ;;
        bridge-utils) command -v brctl >/dev/null ;;
        openssh-client) command -v ssh >/dev/null ;;
        vagrant-lxc) compgen -G '/usr/share/rubygems-integration/all/gems/vagrant-lxc-*' >/dev/null ;;
        e2fsprogs) command -v mkfs.ext4 >/dev/null ;;
        util-linux) command -v unshare >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# An ordinary user's PATH on Debian leaves out where ip and nft live.
PATH="$PATH:/usr/sbin:/sbin"
missing=()
for package in "$@"; do
    present "$package" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q </dev/null
    apt-get install -q -y --no-install-recommends "${missing[@]}" </dev/null
    for package in "${missing[@]}"; do
        present "$package" || { echo "$package is installed, and still not usable (Python 3.11 or newer is needed)" >&2; exit 1; }
    done
else
    echo "Missing: ${missing[*]}. Install with: sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
