//! The real thing: Debian guests with systemd, cloud-init and guest agent, from the template that was built from packages.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::net::TcpListener;
use std::time::Duration;

use common::{Guest, Lab, WALLET, finish, greeting, in_guest, output, virsh};
use serde_json::Value;

fn create(lab: &Lab, vm: &str) -> std::process::Child {
    let sizes = ["--cpu", "1", "--memory", "1024", "--disk", "6", "--username", "alice", "--nft-token-id", "77"];
    let mut command = lab.command("blockhost-vm-create");
    command.args([vm, "--owner-wallet", WALLET, "--apply"]).args(sizes).spawn().unwrap()
}

/// A TCP connection from the guest: the answer's first line, or why there was none.
fn connect_from(vm: &str, address: &str, port: u16) -> String {
    let script = format!(
        "python3 -c 'import socket\n\
         try: print(socket.create_connection((\"{address}\", {port}), 4).recv(32).decode().strip())\n\
         except OSError as e: print(\"no:\", e)'"
    );
    in_guest(vm, &script).trim().to_owned()
}

/// Sends a neighbour advertisement from `vm`, whose address is `own`, that claims `claimed` for its own MAC address.
fn claim(vm: &str, own: &str, claimed: &str) {
    in_guest(
        vm,
        &format!(
            r#"python3 - <<'END'
import glob, os, socket, struct
link = next(l for l in map(os.path.basename, glob.glob("/sys/class/net/e*")))
mac = bytes.fromhex(open(f"/sys/class/net/{{link}}/address").read().replace(":", ""))
address = lambda text: socket.inet_pton(socket.AF_INET6, text)
source, everybody = address("{own}"), address("ff02::1")
# RFC 4861, 4.4: type 136, override; the target; option 2, the link-layer address.
body = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + address("{claimed}") + bytes([2, 1]) + mac
words = source + everybody + struct.pack("!II", len(body), 58) + body
total = sum(struct.unpack(f"!{{len(words) // 2}}H", words))
while total >> 16:
    total = (total & 0xffff) + (total >> 16)
body = body[:2] + struct.pack("!H", ~total & 0xffff) + body[4:]
packet = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + source + everybody + body
sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sender.bind((link, 0))
for _ in range(3):
    sender.send(bytes.fromhex("333300000001") + mac + b"\x86\xdd" + packet)
END"#
        ),
    );
    std::thread::sleep(Duration::from_millis(500));
}

#[test]
fn two_tenants_get_working_machines_of_their_own() {
    let lab = Lab::new(Guest::Debian);
    let (one, two) = (lab.name("one"), lab.name("two"));
    let children = [create(&lab, &one), create(&lab, &two)];
    let results = children.map(|child| {
        let stdout = finish(child).success().stdout;
        serde_json::from_str::<Value>(stdout.lines().next().unwrap()).unwrap()
    });
    let ip = |result: &Value| result["ip"].as_str().unwrap().to_owned();

    // At the moment create returns, the login user is there, and so is everything update-gecos needs.
    for (vm, result) in [&one, &two].into_iter().zip(&results) {
        assert_eq!(result["nft_token_id"], 77);
        let user = in_guest(vm, "getent passwd alice");
        assert!(user.contains(&format!("wallet={WALLET},nft=77")), "{user}");
    }
    for (vm, result) in [&one, &two].into_iter().zip(&results) {
        in_guest(vm, "cloud-init status --wait >/dev/null");
        assert_eq!(in_guest(vm, "cloud-init status").trim(), "status: done");
        // Static address, default route through the bridge, the name.
        let addresses = in_guest(vm, "ip -o address show");
        assert!(addresses.contains(&format!("inet {}/24", ip(result))), "{addresses}");
        assert!(in_guest(vm, "ip route show default").contains("via 10.213."));
        assert_eq!(in_guest(vm, "hostname").trim(), *vm);
        // The disk has grown to what was paid for, less the file system's own needs.
        let size: u64 = in_guest(vm, "df -B1 --output=size / | tail -n 1").trim().parse().unwrap();
        assert!(size > 5 << 30, "{size}");
        // The secret file is the template's, and only root reads it.
        let secret = in_guest(vm, "stat -c %a /etc/pam_web3/config.toml; cat /etc/pam_web3/config.toml");
        assert!(secret.starts_with("600\n") && secret.contains(&format!("id = \"{vm}\"")), "{secret}");
        // ssh: from the host, over both families, through the filter.
        assert!(greeting(&ip(result), 22, Duration::from_secs(30)).starts_with("SSH-2.0"));
        if lab.ipv6() {
            assert!(greeting(result["ipv6"].as_str().unwrap(), 22, Duration::from_secs(30)).starts_with("SSH-2.0"));
        }
        let sshd = in_guest(vm, "sshd -T");
        for line in
            ["kbdinteractiveauthentication yes", "passwordauthentication no", "permitrootlogin no", "usepam yes"]
        {
            assert!(sshd.lines().any(|l| l == line), "{line} is not in:\n{sshd}");
        }
    }

    // Nothing that identifies a machine is shared.
    for identity in [
        "cat /etc/machine-id",
        "cat /etc/ssh/ssh_host_ed25519_key.pub",
        "cat /sys/class/net/e*/address",
        "grep secret_key /etc/pam_web3/config.toml",
        "cat /sys/class/dmi/id/product_uuid",
    ] {
        let (a, b) = (in_guest(&one, identity), in_guest(&two, identity));
        assert!(a.trim().len() >= 16, "{identity}: {a:?}");
        assert_ne!(a, b, "{identity}");
    }

    // Each reaches the host, and not its neighbour.
    let gateway = std::env::var("BLOCKHOST_TEST_GATEWAY").unwrap();
    let listener = TcpListener::bind((gateway.as_str(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = std::io::Write::write_all(&mut &stream, b"host\n");
        }
    });
    assert_eq!(connect_from(&one, &gateway, port), "host");
    assert!(connect_from(&one, &ip(&results[1]), 22).starts_with("no:"));
    // With another's address it reaches nobody.
    in_guest(&one, "ip address add 10.213.255.77/32 dev $(ls -d /sys/class/net/e* | head -n 1 | xargs basename)");
    let forged = in_guest(
        &one,
        &format!(
            "python3 -c 'import socket\n\
             try: print(socket.create_connection((\"{gateway}\", {port}), 4, (\"10.213.255.77\", 0)).recv(32))\n\
             except OSError as e: print(\"no:\", e)'"
        ),
    );
    assert!(forged.starts_with("no:"), "{forged}");

    // Nor can it take over another's IPv6 address on the host, which the host would believe without its own entry for it.
    if lab.ipv6() {
        let ipv6 = |result: &Value| result["ipv6"].as_str().unwrap().to_owned();
        let (attacker, victim) = (ipv6(&results[0]), ipv6(&results[1]));
        let mac = |vm: &str| in_guest(vm, "cat /sys/class/net/e*/address").trim().to_owned();
        let (attackers, victims) = (mac(&one), mac(&two));
        let known = || output("ip", &["-6", "neigh", "show", &victim, "dev", &lab.bridge]);
        assert!(known().contains(&format!("{victims} PERMANENT")), "{}", known());
        output("ip", &["-6", "neigh", "del", &victim, "dev", &lab.bridge]);
        assert!(greeting(&victim, 22, Duration::from_secs(30)).starts_with("SSH-2.0"));
        claim(&one, &attacker, &victim);
        assert!(known().contains(&attackers), "the claim did not arrive: {}", known());
        lab.run("blockhost-vm-start", &[&two]).success();
        claim(&one, &attacker, &victim);
        assert!(known().contains(&format!("{victims} PERMANENT")), "{}", known());
        assert!(greeting(&victim, 22, Duration::from_secs(30)).starts_with("SSH-2.0"));
    }

    // It shuts down when asked, comes back, and is still reachable.
    lab.run("blockhost-vm-stop", &[&one]).success();
    assert_eq!(lab.status(&one), "suspended");
    assert!(virsh(&["domstate", &one]).contains("shut off"));
    lab.run("blockhost-vm-start", &[&one]).success();
    assert!(greeting(&ip(&results[0]), 22, Duration::from_secs(300)).starts_with("SSH-2.0"));

    lab.destroy(&one).success();
    lab.destroy(&two).success();
    lab.assert_no_traces("after both were destroyed");
}
