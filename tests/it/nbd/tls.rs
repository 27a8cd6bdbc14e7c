//! TLS, between us and with other peers, with certificates that are made here.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use vdtool::nbd::tls::{Peers, Server};
use vdtool::nbd::wire::{answer, option};
use vdtool::server::nbd::Options;
use vdtool::storage::Storage;
use vdtool::storage::nbd::{NbdStorage, Options as ClientOptions};
use vdtool::storage::open::Access;

use super::wire::{Raw, wanted};
use super::{Peer, Serving, lasting};
use crate::util::{Seeded, assert_same, peer, requires, scratch};

/// An authority, a server's certificate for localhost, and a client's, in the files that GnuTLS
/// programs use.
fn certificates(dir: &Path) {
    std::fs::create_dir_all(dir).expect("makes the directory");
    let save = |name: &str, text: String| {
        std::fs::write(dir.join(name), text).expect("writes");
    };
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
        .distinguished_name
        .push(DnType::CommonName, "test authority");
    let authority = params.self_signed(&key).expect("signs itself");
    save("ca-cert.pem", authority.pem());
    let issuer = Issuer::new(params, key);
    for (whose, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, whose);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![purpose];
        let certificate = params.signed_by(&key, &issuer).expect("is signed");
        save(&format!("{whose}-cert.pem"), certificate.pem());
        save(&format!("{whose}-key.pem"), key.serialize_pem());
    }
}

fn secure(serving: &Serving, certificates: &Path) -> String {
    format!(
        "nbds+unix:///?socket={}&tls-certificates={}",
        serving.socket.display(),
        certificates.display()
    )
}

fn options(certificates: &Path, peers: Peers) -> Options {
    Options {
        tls: Some(Server::load(certificates, peers).expect("loads")),
        ..lasting()
    }
}

#[test]
fn our_client_and_our_server_talk_under_tls() {
    let dir = scratch();
    certificates(dir.path());
    let mut random = Seeded::new("tls");
    let bytes = random.bytes(3 << 20);
    for peers in [Peers::Any, Peers::Verified] {
        let serving = Serving::raw(&bytes, options(dir.path(), peers));
        assert!(serving.server.addresses()[0].starts_with("nbds+unix://"));
        let uri = secure(&serving, dir.path());
        let storage = NbdStorage::connect(&uri, &ClientOptions::new(Access::Write));
        let storage = storage.expect("connects");
        std::thread::scope(|scope| {
            for part in 0..3 {
                let (storage, bytes) = (&storage, &bytes);
                scope.spawn(move || {
                    let start = part << 20;
                    let mut found = vec![0; 1 << 20];
                    for _ in 0..3 {
                        storage.read_at(&mut found, start as u64).expect("reads");
                        assert_same(&found, &bytes[start..start + (1 << 20)], 0, "read");
                        storage.write_at(&found, start as u64).expect("writes");
                    }
                });
            }
        });
        storage.sync().expect("flushes");
        let found = std::fs::read(serving.image()).expect("reads");
        assert_same(&found, &bytes, 0, "written");
    }
}

#[test]
fn who_does_not_speak_tls_is_refused_where_it_is_required() {
    let dir = scratch();
    certificates(dir.path());
    let serving = Serving::raw(&[7; 4096], options(dir.path(), Peers::Any));
    let mut raw = Raw::connect(&serving.socket);
    for number in [option::LIST, option::STRUCTURED_REPLY, option::GO] {
        let told = raw.ask(number, &wanted("", &[]));
        assert_eq!(told.kind, answer::TLS_REQUIRED);
    }
    assert_eq!(raw.ask(option::STARTTLS, b"x").kind, answer::INVALID);
    raw.option(option::EXPORT_NAME, b"");
    assert!(raw.ended().is_empty());
    let plain = NbdStorage::connect(&serving.uri(""), &ClientOptions::new(Access::Read));
    let error = plain.expect_err("plain");
    assert!(error.message().contains("nbds"), "{error}");
    // The other way round: a client that wants TLS takes nothing less.
    let plain = Serving::raw(&[7; 4096], lasting());
    let uri = secure(&plain, dir.path());
    let error = NbdStorage::connect(&uri, &ClientOptions::new(Access::Read));
    let error = error.expect_err("no TLS there");
    assert!(error.message().contains("no TLS"), "{error}");
    // Noise where TLS should begin.
    let mut raw = Raw::connect(&serving.socket);
    assert_eq!(raw.ask(option::STARTTLS, b"").kind, answer::ACK);
    raw.send(&[0x55; 4000]);
    raw.ended();
}

#[test]
fn certificates_of_others_are_not_believed() {
    let (ours, others) = (scratch(), scratch());
    certificates(ours.path());
    certificates(others.path());
    let serving = Serving::raw(&[7; 4096], options(ours.path(), Peers::Verified));
    let read = ClientOptions::new(Access::Read);
    // A server that another authority vouches for.
    NbdStorage::connect(&secure(&serving, others.path()), &read).expect_err("another server");
    // Another name than the certificate has.
    let uri = format!("{}&tls-hostname=example.org", secure(&serving, ours.path()));
    NbdStorage::connect(&uri, &read).expect_err("another name");
    // A client without a certificate, where one is wanted.
    std::fs::remove_file(ours.path().join("client-cert.pem")).expect("removes");
    let uri = secure(&serving, ours.path());
    let connected = NbdStorage::connect(&uri, &read);
    connected.expect_err("nobody vouches for the client");
    let any = Serving::raw(&[7; 4096], options(ours.path(), Peers::Any));
    NbdStorage::connect(&secure(&any, ours.path()), &read).expect("anybody may come");
    Server::load(others.path().join("x").as_path(), Peers::Any).expect_err("no files");
}

#[test]
fn nbdcopy_copies_under_tls() {
    if !requires("nbdcopy") {
        return;
    }
    let dir = scratch();
    let pki = dir.path().join("pki");
    certificates(&pki);
    let bytes = Seeded::new("nbdcopy under tls").bytes(5 << 20);
    let serving = Serving::raw(&bytes, options(&pki, Peers::Verified));
    let uri = secure(&serving, &pki);
    peer("nbdcopy", dir.path(), [&*uri, "copy.raw"]);
    let found = std::fs::read(dir.path().join("copy.raw")).expect("reads");
    assert_same(&found, &bytes, 0, "copied");
    let target = Serving::raw(&vec![0; bytes.len()], options(&pki, Peers::Any));
    peer("nbdcopy", dir.path(), ["copy.raw", &secure(&target, &pki)]);
    let found = std::fs::read(target.image()).expect("reads");
    assert_same(&found, &bytes, 0, "copied in");
}

#[test]
fn our_client_talks_to_nbdkit_under_tls() {
    if !requires("nbdkit") {
        return;
    }
    let dir = scratch();
    let pki = dir.path().join("pki");
    certificates(&pki);
    let socket = dir.path().join("nbdkit.sock");
    let pki = pki.to_str().expect("UTF-8");
    let tls = format!("--tls-certificates={pki}");
    let arguments = [
        "-f",
        "-U",
        socket.to_str().expect("UTF-8"),
        "--tls=require",
        &tls,
        "--tls-verify-peer",
        "memory",
        "4M",
    ];
    let _peer = Peer::start("nbdkit", &arguments, &socket);
    let uri = format!(
        "nbds+unix:///?socket={}&tls-certificates={pki}",
        socket.display()
    );
    let storage = NbdStorage::connect(&uri, &ClientOptions::new(Access::Write));
    let storage = storage.expect("connects");
    let bytes = Seeded::new("nbdkit under tls").bytes(3_000_000);
    storage.write_at(&bytes, 12_345).expect("writes");
    let mut found = vec![0; bytes.len()];
    storage.read_at(&mut found, 12_345).expect("reads");
    assert_same(&found, &bytes, 0, "read back");
}

/// How a program of QEMU's is told of an export under TLS.
fn qemu_export(serving: &Serving) -> String {
    format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=t,tls-hostname=localhost",
        serving.socket.display()
    )
}

fn qemu_credentials(pki: &Path, endpoint: &str) -> String {
    format!(
        "tls-creds-x509,id=t,endpoint={endpoint},verify-peer=yes,dir={}",
        pki.display()
    )
}

#[test]
fn qemu_img_uses_us_under_tls_with_and_without_a_certificate_of_its_own() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let (pki, bare) = (dir.path().join("pki"), dir.path().join("bare"));
    certificates(&pki);
    std::fs::create_dir(&bare).expect("makes the directory");
    std::fs::copy(pki.join("ca-cert.pem"), bare.join("ca-cert.pem")).expect("copies");
    let bytes = Seeded::new("qemu-img under tls").bytes(5 << 20);
    let run = |serving: &Serving, pki: &Path| {
        let credentials = qemu_credentials(pki, "client");
        let export = qemu_export(serving);
        let arguments = ["convert", "--object", &*credentials, "--image-opts"];
        let arguments = [&arguments[..], &[&*export, "-O", "raw", "copy.raw"]].concat();
        let done = std::process::Command::new("qemu-img")
            .args(arguments)
            .current_dir(dir.path())
            .output()
            .expect("qemu-img runs");
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        (done.status.success(), told)
    };
    for (peers, pki) in [
        (Peers::Any, &pki),
        (Peers::Verified, &pki),
        (Peers::Any, &bare),
    ] {
        let serving = Serving::raw(&bytes, options(&dir.path().join("pki"), peers));
        let (done, told) = run(&serving, pki);
        assert!(done, "{peers:?} {}: {told}", pki.display());
        let found = std::fs::read(dir.path().join("copy.raw")).expect("reads");
        assert_same(&found, &bytes, 0, "converted");
    }
    let serving = Serving::raw(&bytes, options(&pki, Peers::Verified));
    let (done, _) = run(&serving, &bare);
    assert!(!done, "nobody vouches for it");
    // And into us.
    let target = Serving::raw(&vec![0; bytes.len()], options(&pki, Peers::Verified));
    let credentials = qemu_credentials(&pki, "client");
    let export = qemu_export(&target);
    peer(
        "qemu-img",
        dir.path(),
        [
            "convert",
            "--object",
            &*credentials,
            "-n",
            "--target-image-opts",
            "-f",
            "raw",
            "copy.raw",
            &*export,
        ],
    );
    let found = std::fs::read(target.image()).expect("reads");
    assert_same(&found, &bytes, 0, "converted into us");
}

#[test]
fn our_client_talks_to_qemu_nbd_under_tls() {
    if !requires("qemu-nbd") {
        return;
    }
    let dir = scratch();
    let (pki, others) = (dir.path().join("pki"), dir.path().join("others"));
    certificates(&pki);
    certificates(&others);
    let (socket, image) = (dir.path().join("s"), dir.path().join("disk.raw"));
    let bytes = Seeded::new("qemu-nbd under tls").bytes(3 << 20);
    std::fs::write(&image, &bytes).expect("writes");
    let credentials = qemu_credentials(&pki, "server");
    let arguments = [
        "-t",
        "-e",
        "4",
        "-f",
        "raw",
        "--object",
        &credentials,
        "--tls-creds",
        "t",
        "-k",
        socket.to_str().expect("UTF-8"),
        image.to_str().expect("UTF-8"),
    ];
    let _peer = Peer::start("qemu-nbd", &arguments, &socket);
    let uri = |pki: &Path| {
        format!(
            "nbds+unix:///?socket={}&tls-certificates={}",
            socket.display(),
            pki.display()
        )
    };
    let storage = NbdStorage::connect(&uri(&pki), &ClientOptions::new(Access::Write));
    let storage = storage.expect("connects");
    let mut random = Seeded::new("qemu-nbd under tls, requests");
    super::client::exercise(&storage, &mut random);
    drop(storage);
    let read = ClientOptions::new(Access::Read);
    NbdStorage::connect(&uri(&others), &read).expect_err("another authority");
    std::fs::remove_file(pki.join("client-cert.pem")).expect("removes");
    NbdStorage::connect(&uri(&pki), &read).expect_err("no certificate, where one is wanted");
    let plain = NbdStorage::connect(&super::uri(&socket, ""), &read);
    let error = plain.expect_err("plain");
    assert!(error.message().contains("nbds"), "{error}");
}
