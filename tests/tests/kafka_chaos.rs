//! Exactly once against a real broker, whatever breaks: the histories are printed (`make chaos` shows them).
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::process::{Child, Command};
use std::time::Duration;

use tidemill_tests::kafka::Broker;
use tidemill_tests::kafka::chaos::{History, IN_ENGINE, UNCOMMITTED};
use tidemill_tests::kafka::proxy::Proxy;

const KILLS: usize = 50;
const OPTIONS: &str = "session.timeout.ms: 1500, heartbeat.interval.ms: 300";
/// Comes back into the group as the same member, so that nobody waits for the dead.
const STATIC: &str = "session.timeout.ms: 6000, heartbeat.interval.ms: 500, group.instance.id: one";

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn killed_at_random_moments() {
    let broker = Broker::shared();
    let mut history = History::new(broker, broker.address(), "kills", STATIC, "");
    history.feed(broker, 6000);
    let mut random = Random(4);
    for kill in 0..KILLS {
        let (mut child, log) = history.start();
        if kill % 3 == 0 {
            std::thread::sleep(Duration::from_millis(random.below(700)));
        } else {
            history.await_computed(&mut child, &log, random.below(150) as usize);
            std::thread::sleep(Duration::from_millis(random.below(60)));
        }
        assert!(child.try_wait().unwrap().is_none(), "{}", history.log(&log));
        child.kill().unwrap();
        child.wait().unwrap();
        let num_computed = history.pipeline.computed(&log).len();
        history.note(&format!("kill {} after {num_computed} prompts", kill + 1));
    }
    history.finish();
    history.check(broker, IN_ENGINE);
}

#[test]
fn the_broker_is_killed_and_comes_back() {
    let mut broker = Broker::start(0);
    let address = broker.address().to_owned();
    let mut history = History::new(&broker, &address, "broker", OPTIONS, "");
    history.feed(&broker, 3000);
    let (mut child, log) = history.start();
    for kill in 1..=3 {
        history.await_computed(&mut child, &log, kill * 300);
        broker.kill();
        history.note("broker killed");
        std::thread::sleep(Duration::from_millis(700));
        broker.restart();
        history.note("broker restarted");
    }
    history.await_computed(&mut child, &log, 1200);
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    history.note("process stopped");
    history.finish();
    history.check(&broker, IN_ENGINE);
}

#[test]
fn members_join_and_leave() {
    let broker = Broker::shared();
    let mut history = History::new(broker, broker.address(), "members", OPTIONS, "");
    history.feed(broker, 4000);
    let mut random = Random(7);
    let mut running = vec![history.start()];
    for change in 0..12 {
        std::thread::sleep(Duration::from_millis(400 + random.below(700)));
        if running.len() == 2 {
            let (mut child, _) = running.remove(random.below(2) as usize);
            let name = if change % 3 == 0 { "-KILL" } else { "-INT" };
            signal(&child, name);
            child.wait().unwrap();
            history.note(&format!("a member leaves by {name}"));
        } else {
            running.push(history.start());
            history.note("a member joins");
        }
    }
    for (mut child, log) in running {
        signal(&child, "-INT");
        assert_eq!(child.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    }
    history.finish();
    history.check(broker, UNCOMMITTED);
}

#[test]
fn the_network_is_cut() {
    let broker = Broker::start(1);
    let proxy = Proxy::start(broker.proxies[0]);
    let address = format!("127.0.0.1:{}", broker.proxies[0].0);
    let mut history = History::new(&broker, &address, "cut", OPTIONS, "");
    history.feed(&broker, 1800);
    let (mut child, log) = history.start();
    let mut random = Random(3);
    for fault in 1..=4 {
        history.await_computed(&mut child, &log, fault * 120);
        std::thread::sleep(Duration::from_millis(random.below(50)));
        let (is_silent, is_long) = (fault % 2 == 0, fault % 4 >= 2);
        if is_silent {
            proxy.swallow();
        } else {
            proxy.cut();
        }
        let what = if is_silent { "nothing comes through" } else { "cut" };
        std::thread::sleep(Duration::from_millis(if is_long { 3000 } else { 100 + random.below(400) }));
        proxy.heal();
        history.note(&format!(
            "{what} {}",
            if is_long { "for longer than the session" } else { "for a moment" }
        ));
    }
    history.await_computed(&mut child, &log, 700);
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    history.finish();
    history.check(&broker, IN_ENGINE);
}

/// A process that is stopped for longer than its session comes back to a group in which its partitions are another's,
/// and must commit nothing of what it held.
#[test]
fn a_stopped_member_comes_back() {
    let broker = Broker::shared();
    let sink = ", transaction_timeout_ms: 1000, commit_ms: 10";
    let mut history = History::new(broker, broker.address(), "stopped", OPTIONS, sink);
    history.feed(broker, 1500);
    let (mut member, log) = history.start();
    for round in 1..=2 {
        history.await_computed(&mut member, &log, round * 100);
        signal(&member, "-STOP");
        history.note("a member is stopped");
        let (mut heir, heir_log) = history.start();
        history.await_computed(&mut heir, &heir_log, 100);
        signal(&member, "-CONT");
        history.note("it comes back");
        history.await_computed(&mut heir, &heir_log, 160);
        signal(&heir, "-INT");
        assert_eq!(heir.wait().unwrap().code(), Some(130), "{}", history.log(&heir_log));
        history.note("its heir leaves");
    }
    signal(&member, "-INT");
    assert_eq!(member.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    history.finish();
    history.check(broker, UNCOMMITTED);
}

/// Stops a process while it has a transaction open.
fn stop_amid_transaction(broker: &Broker, history: &mut History, child: &mut Child) {
    let topic = format!("{}-out", history.name);
    loop {
        assert!(child.try_wait().unwrap().is_none(), "it ended before a transaction was caught");
        signal(child, "-STOP");
        // What was on its way arrives.
        std::thread::sleep(Duration::from_millis(100));
        if broker.has_open_transaction(&topic) {
            return history.note("a process is stopped amid a transaction");
        }
        signal(child, "-CONT");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The heir goes by the same name and has neither the memory nor the disk of the one before it, which still lives.
#[test]
fn a_zombie_is_fenced() {
    let broker = Broker::shared();
    let sink = ", transactional_id: the-writer, transaction_timeout_ms: 300000, commit_ms: 10";
    let mut history = History::new(broker, broker.address(), "zombie", OPTIONS, sink);
    history.feed(broker, 1200);
    let (mut zombie, log) = history.start();
    history.await_computed(&mut zombie, &log, 100);
    stop_amid_transaction(broker, &mut history, &mut zombie);
    history.pipeline.env.push(("STATE", "other".to_owned()));
    history.finish();
    history.check_output(broker);
    let num_results = broker.read("zombie-out").len();
    assert!(!history.log(&log).contains("fenced"));
    signal(&zombie, "-CONT");
    history.note("the zombie comes back");
    while !history.log(&log).contains("the producer was fenced") {
        assert!(zombie.try_wait().unwrap().is_none(), "{}", history.log(&log));
        std::thread::sleep(Duration::from_millis(20));
    }
    history.note("the zombie is fenced");
    signal(&zombie, "-INT");
    assert_eq!(zombie.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    history.check(broker, UNCOMMITTED);
    assert_eq!(broker.read("zombie-out").len(), num_results);
}

/// Nobody else comes by that name, so only the broker can end what was left open.
#[test]
fn a_transaction_times_out() {
    let broker = Broker::shared();
    let sink = ", transaction_timeout_ms: 1500, commit_ms: 10";
    let mut history = History::new(broker, broker.address(), "timeout", OPTIONS, sink);
    history.feed(broker, 1000);
    let (mut child, log) = history.start();
    history.await_computed(&mut child, &log, 100);
    stop_amid_transaction(broker, &mut history, &mut child);
    let before = broker.read("timeout-out").len();
    broker.await_transactions("timeout-out");
    history.note("the broker has ended the transaction");
    assert_eq!(broker.read("timeout-out").len(), before, "by aborting it");
    signal(&child, "-CONT");
    history.await_computed(&mut child, &log, 400);
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    history.finish();
    history.check(broker, IN_ENGINE);
}
