#!/bin/sh
# Makes a Debian system into BlockHost's template, from inside: in a chroot of a fresh tree, or in a cloud image
# through virt-customize. Run as root: customise.sh DIRECTORY
#   DIRECTORY/packages/*.deb   what must be installed (may be absent)
#   DIRECTORY/packages.list    "name version" of each of them, one per line
#   DIRECTORY/apt.conf         settings of the building host that apt needs to reach its mirror (may be absent)
# Speaks on stderr, in lines that begin with "customise: ". Removes DIRECTORY at its end.
set -eu

work=$1
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root
[ ! -f "$work/apt.conf" ] || export APT_CONFIG="$work/apt.conf"

say() { echo "customise: $*" >&2; }
die() { echo "customise: error: $*" >&2; exit 1; }
installed() { [ "$(dpkg-query -W -f '${Status}' "$1" 2>/dev/null)" = "install ok installed" ]; }
apt() {
    apt-get -q -y -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -o Dpkg::Use-Pty=0 \
        -o Acquire::Retries=3 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 "$@" >&2
}

# Nothing that is installed here may start: there is no init, and the network is the building host's.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi

missing=
for package in systemd-sysv dbus udev cloud-init cloud-guest-utils netplan.io systemd-resolved qemu-guest-agent \
    openssh-server sudo curl ca-certificates; do
    installed "$package" || missing="$missing $package"
done
updated=
update() {
    [ -z "$updated" ] || return 0
    updated=yes
    say "phase fetching package lists"
    apt update || say "warning: package lists could not be fetched"
}
if [ -n "$missing" ]; then
    update
    say "phase installing$missing"
    # shellcheck disable=SC2086
    apt install --no-install-recommends $missing || die "apt cannot install$missing"
fi

if [ -d "$work/packages" ] && [ -s "$work/packages.list" ]; then
    # The lists are needed only where a package has a dependency that is not there yet.
    apt-get -s -q --no-remove install "$work"/packages/*.deb > /dev/null 2>&1 || update
    say "phase installing the template packages"
    # One call, so that they may depend on each other. Not -f: it would remove a package to satisfy the others.
    apt install --no-remove --allow-downgrades --reinstall "$work"/packages/*.deb ||
        die "apt cannot install the template packages"
    while read -r name version; do
        [ "$(dpkg-query -W -f '${Status} ${Version}' "$name" 2>/dev/null)" = "install ok installed $version" ] ||
            die "template package $name $version is not installed"
    done < "$work/packages.list"
    broken=$(dpkg --audit) || die "dpkg cannot check the packages"
    [ -z "$broken" ] || die "dpkg reports broken packages: $(echo "$broken" | tr '\n' ' ')"
fi
say "phase configuring the image"

# --- network and services ------------------------------------------------------------------------------------------
for unit in systemd-networkd systemd-resolved ssh; do
    systemctl enable "$unit" > /dev/null 2>&1 || die "cannot enable $unit"
done
# Looks for LVM snapshots at every boot, for seconds; this image has no LVM.
systemctl disable e2scrub_reap.service e2scrub_all.timer > /dev/null 2>&1 || :
mkdir -p /etc/cloud/cloud.cfg.d
cat > /etc/cloud/cloud.cfg.d/95-blockhost.cfg <<'END'
# Only the seed: nothing is asked of the network, and boot does not wait for it.
datasource_list: [ NoCloud, None ]
# The mirror the image was built from stays in use.
apt:
  preserve_sources_list: true
# A copy of the image must never share its host keys with another one.
ssh_deletekeys: true
ssh_genkeytypes: [ ed25519, ecdsa, rsa ]
growpart:
  mode: auto
  devices: [ '/' ]
END
printf 'LANG=C.UTF-8\n' > /etc/default/locale
[ -s /etc/hosts ] || printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > /etc/hosts
# The host asks the agent to run commands and read files; a list of forbidden calls must not stand in the way.
if [ -f /etc/qemu/qemu-ga.conf ]; then
    sed -i -E 's/^[[:space:]]*(blacklist|block-rpcs|allow-rpcs)[[:space:]]*=/#&/' /etc/qemu/qemu-ga.conf
fi
if [ -f /etc/default/qemu-guest-agent ]; then
    sed -i -E 's/^[^#].*(blacklist|block-rpcs|allow-rpcs|-b[[:space:]]).*/#&/' /etc/default/qemu-guest-agent
fi

# --- ssh: challenge and response through PAM, nothing else with a password -------------------------------------------
config=/etc/ssh/sshd_config
dropins=/etc/ssh/sshd_config.d
mkdir -p "$dropins"
for file in "$config" "$dropins"/*.conf; do
    [ ! -f "$file" ] || sed -i -E \
        's/^[[:space:]]*(KbdInteractiveAuthentication|ChallengeResponseAuthentication)[[:space:]=]+"?no.*/#&/I' "$file"
done
# The first value sshd reads counts, so the drop-ins must come first, and ours before the others.
sed -i -E "/^[[:space:]]*Include[[:space:]]+.*sshd_config\\.d\\/\\*\\.conf/Id" "$config"
printf 'Include %s/*.conf\n' "$dropins" | cat - "$config" > "$config.new"
chmod --reference="$config" "$config.new"
mv "$config.new" "$config"
cat > "$dropins/00-blockhost.conf" <<'END'
# A login answers a challenge through PAM; passwords and root are out. Read first, so that no later file, such as the
# one cloud-init writes for ssh_pwauth, can say otherwise.
KbdInteractiveAuthentication yes
ChallengeResponseAuthentication yes
UsePAM yes
PasswordAuthentication no
PermitRootLogin no
END
mkdir -p /run/sshd
rm -f /etc/ssh/ssh_host_*
ssh-keygen -q -A || die "cannot make host keys to check the configuration of sshd with"
effective=$(sshd -T 2>/dev/null) || die "sshd refuses its configuration: $(sshd -T 2>&1 | head -n 1)"
rm -f /etc/ssh/ssh_host_*
for setting in "kbdinteractiveauthentication yes" "usepam yes" "passwordauthentication no" "permitrootlogin no"; do
    echo "$effective" | grep -qix "$setting" || die "sshd is not set to: $setting"
done

# --- nothing of this build, and nothing two machines must not share --------------------------------------------------
say "phase cleaning the image"
# cloud-init clean needs no network; --seed would also remove what a package put there on purpose.
cloud-init clean --logs > /dev/null 2>&1 || rm -rf /var/lib/cloud/instances /var/lib/cloud/instance /var/lib/cloud/data
rm -f /etc/netplan/50-cloud-init.yaml /etc/network/interfaces.d/50-cloud-init /etc/hostname
: > /etc/machine-id
rm -f /var/lib/dbus/machine-id /var/lib/systemd/random-seed /var/lib/systemd/credential.secret
rm -f /var/lib/dhcp/*.lease* /root/.bash_history /root/.lesshst /root/.wget-hsts
# Not /tmp: whoever runs this keeps files there that are still needed (mmdebstrap the settings that tell apt to work on
# the tree and not on the building host).
rm -rf /var/tmp/cloud-init /run/sshd
apt-get clean
rm -rf /var/lib/apt/lists/*
rm -f /var/cache/apt/*.bin /var/cache/debconf/*-old /var/lib/dpkg/*-old
ln -sfn ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
find /var/log -type f -exec sh -c ': > "$1"' sh {} \;
rm -rf /var/log/journal/*
rm -rf "$work"
say "done"
