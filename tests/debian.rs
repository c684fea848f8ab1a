//! The real thing: Debian guests with systemd, cloud-init and guest agent, from the template that was built from packages.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use common::{Guest, Lab, WALLET, finish, greeting, in_guest, output, patience, virsh};
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
    std::thread::sleep(Duration::from_secs(2));
}

/// What tests/guest.rs shows with busybox, with the shell and the agent service of a Debian.
fn commands_run_in(lab: &Lab, vm: &str) {
    let exec = |words: &[&str]| {
        let mut all = vec![vm];
        all.extend(words);
        lab.run("blockhost-vm-guest-exec", &all)
    };
    let text = "echo 'a  \"b\"' \"c 'd'\" $((1 + 1)) \\$x && printf '%s' ü |\ncat; whoami; wc -c; exit 7";
    let outcome = exec(&[text]);
    assert_eq!((outcome.code, &*outcome.stdout), (Some(7), "a  \"b\" c 'd' 2 $x\nüroot\n0\n"), "{outcome:?}");
    let killed = exec(&["kill -KILL $$"]);
    assert_eq!((killed.code, &*killed.stderr), (Some(137), ""), "{killed:?}");
    exec(&["--help"]).fails_with(127);
    let much = exec(&["--", "head -c 10485760 /dev/zero; head -c 10485760 /dev/zero >&2; echo end"]).success();
    assert_eq!(much.stdout.len(), 1 << 20);
    assert!(much.reason().contains("stdout and stderr were cut off"), "{}", much.reason());
    // The agent logs what it starts, but not what that is given.
    exec(&[": s3cret-$((40 + 2))"]).success();
    let logged =
        in_guest(vm, "journalctl --no-pager -u qemu-guest-agent | grep -c guest-exec; journalctl | grep -c s3cret");
    let counts: Vec<u32> = logged.lines().map(|line| line.parse().unwrap()).collect();
    assert!(counts[0] > 0, "the agent logs what it starts: {counts:?}");
    // Our own question names it.
    assert!(counts[1] <= 1, "{}", in_guest(vm, "journalctl | grep s3cret"));
}

fn the_owner_is_named_in(lab: &Lab, vm: &str) {
    let update = |wallet: &str, id: &str| lab.run("blockhost-vm-update-gecos", &[vm, wallet, "--nft-id", id]);
    let gecos = |user: &str| in_guest(vm, &format!("getent passwd {user} | cut -d: -f5")).trim_end().to_owned();
    // As cloud-init has made it, and as often as one likes: the file is not even written anew.
    let inode = || in_guest(vm, "stat -c %i%Z /etc/passwd");
    let before = inode();
    update(WALLET, "77").success();
    update(WALLET, "77").success();
    assert_eq!(inode(), before);
    let others = in_guest(vm, "grep -v ^alice: /etc/passwd");
    let forms = [
        ("0x52908400098527886E0F7030069857D2E4169EE7", "0"),
        (&format!("0x{}", "a1".repeat(32)), "18446744073709551616"),
        (&"ab".repeat(28), "007"),
        (
            "addr_test1qz2fxv2umyhttkxyxp8x0dlpdt3k6cwng5pxj3jhsydzer3jcu5d8ps7zex2k2xt3uqxgjqnnj83ws8lhrn648jjxtwq2ytjqp",
            "1",
        ),
        ("9fRAWhdxEsTcdb8PhGNrZfwqa65zfkuYHAMmkQLcic1gdLSV5vA", &"f0".repeat(32)),
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", "42"),
    ];
    for (wallet, id) in forms {
        assert_eq!(update(wallet, id).success().stdout, "");
        assert_eq!(gecos("alice"), format!("wallet={wallet},nft={id}"));
    }
    // Several at once leave a file that is whole.
    let children: Vec<_> = ["a", "b", "c"]
        .map(|id| lab.command("blockhost-vm-update-gecos").args([vm, WALLET, "--nft-id", id]).spawn().unwrap())
        .into_iter()
        .collect();
    for child in children {
        let outcome = finish(child);
        // Another one's value may be there when it is read back.
        assert!(outcome.code == Some(0) || outcome.reason().contains("the field is another"), "{outcome:?}");
    }
    assert_eq!(in_guest(vm, "grep -v ^alice: /etc/passwd"), others);
    assert_eq!(in_guest(vm, "grep -c ^alice: /etc/passwd; ls /etc/passwd.lock 2>/dev/null").trim(), "1");
    update(WALLET, "77").success();
    assert_eq!(gecos("alice"), format!("wallet={WALLET},nft=77"));
    lab.run("blockhost-vm-update-gecos", &[vm, WALLET, "--nft-id", "77", "--username", "admin"])
        .fails_with(1)
        .says("has no user admin");
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
        // However long that takes on a busy machine.
        lab.run("blockhost-vm-guest-exec", &[vm, "cloud-init status --wait >/dev/null"]).success();
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

    commands_run_in(&lab, &one);
    the_owner_is_named_in(&lab, &one);

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
    let begin = Instant::now();
    lab.run("blockhost-vm-update-gecos", &[&one, WALLET, "--nft-id", "77"]).fails_with(1).says("does not run");
    assert!(begin.elapsed() < patience(Duration::from_secs(20)));
    assert!(virsh(&["domstate", &one]).contains("shut off"));
    lab.run("blockhost-vm-start", &[&one]).success();
    assert!(greeting(&ip(&results[0]), 22, Duration::from_secs(300)).starts_with("SSH-2.0"));

    lab.destroy(&one).success();
    lab.destroy(&two).success();
    lab.assert_no_traces("after both were destroyed");
}
