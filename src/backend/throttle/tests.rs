use super::*;

fn limits(text: &str) -> Limits {
    Limits::parse(text.split(',')).expect(text)
}

/// Requests of `bytes` that are let in within `time`, by one who comes whenever told to.
fn within(place: &Membership, kind: Kind, bytes: u64, from: Instant, time: Duration) -> u64 {
    let mut now = from;
    let mut count = 0;
    while now < from + time {
        match place.ask(kind, bytes, now) {
            Ok(()) => count += 1,
            Err(at) => {
                assert!(at > now, "is told to come later");
                now = at;
            }
        }
    }
    count
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn over_time_the_average_is_reached_and_not_passed() {
    for (text, bytes, each_second) in [
        ("bps=1M", 4096, 256),
        ("iops=100", 4096, 100),
        ("iops-rd=1", 512, 1),
        ("bps-rd=1k", 10_240, 0),
        ("iops=100,size=4k", 16_384, 25),
        ("iops=1000,bps=1M", 65_536, 16),
    ] {
        let group = Arc::new(Group::new(limits(text)));
        let place = group.join();
        let start = Instant::now();
        let count = within(&place, Kind::Read, bytes, start, 100 * SECOND);
        let expected = match text {
            // One each ten seconds.
            "bps-rd=1k" => 10,
            _ => 100 * each_second,
        };
        // The tenth of a second that may come at once, and the first one.
        let most = expected + each_second / 10 + 2;
        assert!(count >= expected && count <= most, "{text}: {count}");
    }
}

#[test]
fn a_limit_of_one_way_leaves_the_other_alone() {
    let place = Arc::new(Group::new(limits("iops-wr=1"))).join();
    let now = Instant::now();
    for _ in 0..1000 {
        place.ask(Kind::Read, 4096, now).expect("reads are free");
        place.ask(Kind::Flush, 0, now).expect("flushes are free");
    }
    place.ask(Kind::Write, 4096, now).expect("the first");
    let at = place
        .ask(Kind::Zero, 4096, now)
        .expect_err("zeroes are writes");
    let wait = (at - now).as_secs_f64();
    assert!((0.89..0.91).contains(&wait), "{wait}");
}

#[test]
fn a_burst_lets_in_its_sum_and_then_the_average() {
    let now = Instant::now();
    let at_once = |text: &str| {
        let place = Arc::new(Group::new(limits(text))).join();
        let count = (0..100_000).take_while(|_| place.ask(Kind::Read, 512, now).is_ok());
        count.count()
    };
    assert_eq!(at_once("iops=100"), 11);
    assert_eq!(at_once("iops=100,iops-burst=2000"), 2001);
    // A longer burst has a rate too.
    let text = "iops=100,iops-burst=2000,iops-burst-length=10";
    assert_eq!(at_once(text), 201);
    let place = Arc::new(Group::new(limits(text))).join();
    let burst = within(&place, Kind::Read, 512, now, 5 * SECOND);
    assert!((9_900..10_300).contains(&burst), "{burst}");
    let rest = within(&place, Kind::Read, 512, now + 5 * SECOND, 1000 * SECOND);
    // 20 000 in all, and 100 a second.
    assert!((burst + rest).abs_diff(20_000 + 100_500) < 1000, "{rest}");
}

#[test]
fn members_of_a_group_share_it_evenly_however_much_each_wants() {
    let group = Arc::new(Group::new(limits("iops=100")));
    let members = [group.join(), group.join(), group.join()];
    let mut counts = [0u32; 3];
    let mut now = Instant::now();
    let end = now + 100 * SECOND;
    while now < end {
        // The first asks sixteen times for each time the others do.
        let mut next = end;
        for (index, member) in members.iter().enumerate() {
            for _ in 0..if index == 0 { 16 } else { 1 } {
                match member.ask(Kind::Write, 4096, now) {
                    Ok(()) => counts[index] += 1,
                    Err(at) => next = next.min(at),
                }
            }
        }
        now = next.max(now + SHORTEST);
    }
    let all: u32 = counts.iter().sum();
    assert!((9_900..10_100).contains(&all), "{counts:?}");
    for count in counts {
        assert!(count.abs_diff(all / 3) < all / 20, "{counts:?}");
    }
}

#[test]
fn a_member_that_does_not_come_back_keeps_nobody_out_for_long() {
    let group = Arc::new(Group::new(limits("iops=10")));
    let (gone, here) = (group.join(), group.join());
    let now = Instant::now();
    while gone.ask(Kind::Read, 512, now).is_ok() {}
    let count = within(&here, Kind::Read, 512, now, 10 * SECOND);
    assert!((97..=101).contains(&count), "{count}");
    while gone.ask(Kind::Read, 512, now + 20 * SECOND).is_ok() {}
    drop(gone);
    let count = within(&here, Kind::Read, 512, now + 20 * SECOND, 10 * SECOND);
    assert!((98..=101).contains(&count), "{count}");
}

#[test]
fn other_limits_hold_at_once() {
    let group = Arc::new(Group::new(limits("iops=1")));
    let place = group.join();
    let now = Instant::now();
    while place.ask(Kind::Read, 512, now).is_ok() {}
    group.set(Limits::none());
    for _ in 0..100 {
        place.ask(Kind::Read, 512, now).expect("free");
    }
    group.set(limits("iops=2"));
    place
        .ask(Kind::Read, 512, now)
        .expect("what was is forgotten");
    place.ask(Kind::Read, 512, now).expect_err("limited again");
}

#[test]
fn limits_that_contradict_each_other_are_refused_by_name() {
    for (text, names) in [
        ("bps=1,bps-rd=1", ["bps", "bps-rd"]),
        ("iops=1,iops-wr=1", ["iops", "iops-wr"]),
        ("bps=10,bps-burst=9", ["bps-burst", "10"]),
        ("bps-burst=9", ["burst", "bps"]),
        (
            "iops=1,iops-burst-length=9",
            ["iops-burst-length", "iops-burst"],
        ),
        (
            "iops=1,iops-burst=2,iops-burst-length=86401",
            ["86400", "iops-burst-length"],
        ),
        ("iops=0", ["iops", "allowed"]),
        ("iops=8E", ["iops", "allowed"]),
        ("iops=x", ["iops", "size"]),
        ("speed=9", ["speed", "iops-wr"]),
        ("bps-rd-burst-x=9", ["bps-rd-burst-x", "allowed"]),
        ("bps", ["bps", "KEY=VALUE"]),
        ("size=4k", ["size", "iops"]),
    ] {
        let error = Limits::parse(text.split(',')).expect_err(text);
        for name in names {
            assert!(error.message().contains(name), "{text}: {error}");
        }
    }
    let mixed = limits("bps-rd=1k,bps-wr=2k,iops=5,size=64k");
    assert_eq!(mixed.rate(Key::BpsWrite).map(|r| r.average), Some(2048));
    assert_eq!(mixed.op_size(), Some(65_536));
}
