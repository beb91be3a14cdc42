//! Who may connect: TLS on every connection, a stranger with and without a certificate, and what a stranger costs.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::LazyLock,
    thread,
    time::Duration,
};

use crate::{
    certificates::{Authority, EXPIRED, VALID},
    command::{Directory, Ended, Running, listen, start, words},
    start::run,
};

/// The certificates of all tests here.
///
/// | certificate | is |
/// |---|---|
/// | here | of 127.0.0.1 and here.example |
/// | other | of other.example |
/// | expired | of 127.0.0.1, and over |
static OURS: LazyLock<Authority> = LazyLock::new(authority);
static THEIRS: LazyLock<Authority> = LazyLock::new(authority);

fn authority() -> Authority {
    let authority = Authority::new();
    authority.certificate("here", "IP:127.0.0.1,DNS:here.example", VALID);
    authority.certificate("other", "DNS:other.example", VALID);
    authority.certificate("expired", "IP:127.0.0.1,DNS:here.example", EXPIRED);
    authority
}

fn good() -> String {
    OURS.options("", "here", &OURS)
}

fn receiving(options: &str) -> (Running, String) {
    let line = format!("receive --json --device sim:id=a --listen 127.0.0.1:0{options}");
    listen(words(&line))
}

fn send(address: &str, options: &str) -> Running {
    start(words(&format!(
        "send --json --device sim:id=a --to {address}{options}"
    )))
}

/// That a source has moved its device, and the destination, and the relay, have ended well.
fn moved(sent: Ended, others: impl IntoIterator<Item = Running>) -> Vec<Ended> {
    let state = |ended: &Ended| ended.json()["devices"][0]["state_sha256"].clone();
    let others: Vec<_> = others.into_iter().map(Running::end).collect();
    for other in &others {
        assert_eq!(other.status, Some(0), "{other:?}");
    }
    assert_eq!(state(&sent), state(&others[0]));
    others
}

// ----------------------------------------------------------------------------- who has a certificate

#[test]
fn a_migration_over_tls_by_tcp_and_by_a_unix_socket() {
    let (destination, address) = receiving(&format!("{} --tls-peer here.example", good()));
    moved(send(&address, &good()).end(), [destination]);

    let directory = Directory::new();
    let path = format!("unix:{}", directory.file("socket"));
    let line = format!("receive --json --device sim:id=a --listen {path}{}", good());
    let (destination, _) = listen(words(&line));
    let ended = send(&path, &good()).end();
    assert!(ended.why().contains("see --tls-peer"), "{ended:?}");
    let ended = send(&path, &format!("{} --tls-peer here.example", good())).end();
    moved(ended, [destination]);
}

#[test]
fn each_side_of_a_relay_has_tls_by_itself() {
    let to = OURS.options("to-", "here", &OURS);
    for (near, far) in [(true, true), (true, false), (false, true)] {
        let only = |yes: bool, options: String| if yes { options } else { String::new() };
        let (destination, address) = receiving(&only(far, good()));
        let line = format!(
            "relay --json --listen 127.0.0.1:0 --to {address}{}{}",
            only(near, good()),
            only(far, to.clone()),
        );
        let (relay, address) = listen(words(&line));
        moved(
            send(&address, &only(near, good())).end(),
            [destination, relay],
        );
    }
}

// ---------------------------------------------------------------------------------- who has none

/// `openssl s_client`, which says what a main channel begins with. All that it printed.
fn s_client(address: &str, options: &str) -> String {
    let mut client = Command::new("openssl")
        .args(words(&format!(
            "s_client -ign_eof -connect {address} {options}"
        )))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl, which has to be installed");
    // It may have been refused already.
    let _said = client.stdin.take().unwrap().write_all(b"QEVM\0\0\0\x03");
    let output = client.wait_with_output().unwrap();
    let both = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn key_of(authority: &Authority, name: &str) -> String {
    format!(
        "-cert {} -key {}",
        authority.file(&format!("{name}.pem")),
        authority.file(&format!("{name}.key"))
    )
}

/// The commands that listen, each with a destination behind it, and who ends with the migration.
fn with_each_listener(options: &str, test: impl Fn(&str)) -> Vec<Ended> {
    let mut ended = Vec::new();
    for relayed in [false, true] {
        let (destination, address, relay) = if relayed {
            let (destination, address) = receiving("");
            let line = format!("relay --json --listen 127.0.0.1:0 --to {address}{options}");
            let (relay, address) = listen(words(&line));
            (destination, address, Some(relay))
        } else {
            let (destination, address) = receiving(options);
            (destination, address, None)
        };
        test(&address);
        // A good peer is not harmed.
        let sent = send(&address, &good()).end();
        let mut others = moved(sent, [destination].into_iter().chain(relay));
        ended.push(others.pop().unwrap());
    }
    ended
}

#[test]
fn a_stranger_gets_nothing_and_a_good_peer_is_not_harmed() {
    let options = format!("{} --tls-peer here.example", good());
    let ended = with_each_listener(&options, |address| {
        for (client, alert) in [
            (String::new(), "certificate required"),
            (key_of(&THEIRS, "here"), "alert"),
            (key_of(&OURS, "expired"), "alert certificate expired"),
            (key_of(&OURS, "other"), "alert bad certificate"),
            ("-tls1_2".to_owned(), "alert protocol version"),
        ] {
            let said = s_client(address, &client);
            assert!(said.contains(alert), "{client}: {said}");
        }
        // Our own, too, hears why.
        let other = OURS.options("", "other", &OURS);
        let refused = send(address, &other).end();
        assert!(refused.why().contains("BadCertificate"), "{refused:?}");
        // It has no TLS.
        let mut plain = TcpStream::connect(address).unwrap();
        plain.write_all(b"QEVM\0\0\0\x03").unwrap();
        let mut answer = Vec::new();
        let _reset = plain.read_to_end(&mut answer);
        assert!(
            !answer.starts_with(b"\0"),
            "no reply, an alert at most: {answer:?}"
        );
        let refused = send(address, "").end();
        assert_eq!(refused.status, Some(1), "{refused:?}");
    });
    for ended in ended {
        for why in [
            "peer sent no certificates",
            "UnknownIssuer",
            "expired",
            "not valid for name \"here.example\"",
        ] {
            assert!(ended.stderr.contains(why), "{why}: {ended:?}");
        }
    }
}

#[test]
fn a_source_refuses_a_destination_with_a_wrong_certificate_and_says_why() {
    for (authority, certificate, why) in [
        (&*THEIRS, "here", "UnknownIssuer"),
        (&*OURS, "expired", "expired"),
        (&*OURS, "other", "not valid for name \"127.0.0.1\""),
    ] {
        // The destination itself would take the source.
        let (destination, address) = receiving(&authority.options("", certificate, &OURS));
        let refused = send(&address, &good()).end();
        assert!(refused.why().contains(why), "{refused:?}");
        assert!(refused.why().contains("cannot connect to"), "{refused:?}");
        // A relay, of its destination.
        let to = OURS.options("to-", "here", &OURS);
        let line = format!("relay --json --listen 127.0.0.1:0 --to {address}{to}");
        let (relay, near) = listen(words(&line));
        let refused = send(&near, "").end();
        assert_eq!(refused.status, Some(1));
        let relay = relay.end();
        assert!(relay.why().contains(why), "{relay:?}");
        destination.signal("TERM");
        let ended = destination.end();
        assert_eq!(ended.status, Some(130));
        assert!(
            ended.stderr.contains("a connection was refused"),
            "{ended:?}"
        );
    }
}

#[test]
fn files_that_are_no_certificates_are_named_before_anything_is_done() {
    let wrong = OURS.file("ca.key");
    let ended = run(words(&format!(
        "send --device sim:id=a --to 127.0.0.1:9 --tls-cert {wrong} --tls-key {} --tls-ca {}",
        OURS.file("here.key"),
        OURS.file("ca.pem"),
    )));
    assert!(
        ended.why().contains(&format!("cannot use {wrong}")),
        "{ended:?}"
    );
    let ended = run(words(&format!(
        "receive --device sim:id=a --listen 127.0.0.1:0 --tls-cert {} --tls-key /nowhere --tls-ca {}",
        OURS.file("here.pem"),
        OURS.file("ca.pem"),
    )));
    assert!(ended.why().contains("cannot use /nowhere"), "{ended:?}");
    let ended = run(words(
        "receive --device sim:id=a --listen 127.0.0.1:0 --tls-cert x",
    ));
    assert_eq!(ended.status, Some(2), "{ended:?}");
}

// ------------------------------------------------------------------------------ what a stranger costs

fn threads(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/task"))
        .unwrap()
        .count()
}

#[test]
fn strangers_who_never_complete_a_handshake_cost_no_thread_and_no_line_each() {
    let (destination, address) = receiving(&good());
    let before = threads(destination.id());
    let strangers: Vec<_> = (0..500)
        .map(|number| {
            let mut stranger = TcpStream::connect(&address).unwrap();
            // The beginning of a client's hello, or nothing, or no TLS at all.
            let said: &[u8] = match number % 3 {
                0 => &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3],
                1 => b"",
                _ => b"GET / HTTP/1.1\r\n\r\n",
            };
            stranger.write_all(said).unwrap();
            stranger
        })
        .collect();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(threads(destination.id()), before);
    let sent = send(&address, &format!("{} --connect-timeout 60", good())).end();
    let ended = moved(sent, [destination]).remove(0);
    assert!(ended.stderr.lines().count() < 30, "{ended:?}");
    drop(strangers);
}

#[test]
fn an_interrupt_ends_a_handshake_that_does_not_go_on() {
    // A destination that accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let options = format!("{} --connect-timeout 600", good());
    let source = send(&address, &options);
    let (mut accepted, _) = silent.accept().unwrap();
    // It has sent its part.
    accepted.read_exact(&mut [0; 5]).unwrap();
    source.signal("INT");
    assert_eq!(source.end().status, Some(130));
    // Without the interrupt it ends by its time.
    let ended = send(&address, &format!("{} --connect-timeout 0.3", good())).end();
    assert!(ended.why().contains("handshake in time"), "{ended:?}");

    let (destination, address) = receiving(&good());
    let mut stranger = TcpStream::connect(&address).unwrap();
    stranger.write_all(&[22, 3, 1, 2, 0, 1, 0, 1]).unwrap();
    destination.signal("INT");
    assert_eq!(destination.end().status, Some(130));
}

#[test]
fn without_tls_only_this_host_may_connect_unless_it_is_said() {
    for command in ["receive --device sim:id=a", "relay --to unix:/nobody"] {
        for address in ["0.0.0.0:0", "[::]:0"] {
            let ended = run(words(&format!("{command} --listen {address}")));
            let said: Vec<_> = ended.stderr.lines().collect();
            assert_eq!(ended.status, Some(1), "{ended:?}");
            assert_eq!(said.len(), 1, "{ended:?}");
            assert!(said[0].contains("--tls-cert"), "{ended:?}");
            assert!(said[0].contains("--insecure"), "{ended:?}");
        }
        for options in ["--insecure".to_owned(), good()] {
            let line = format!("{command} --listen 0.0.0.0:0 {options}");
            let (listening, _) = listen(words(&line));
            listening.signal("TERM");
            assert_eq!(listening.end().status, Some(130));
        }
    }
}
