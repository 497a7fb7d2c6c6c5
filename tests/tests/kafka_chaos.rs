//! Exactly once against a real broker, whatever breaks: the histories are printed (`make chaos` shows them).
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::process::{Child, Command};
use std::time::Duration;

use tidemill_tests::kafka::Broker;
use tidemill_tests::kafka::chaos::History;
use tidemill_tests::kafka::proxy::Proxy;

const KILLS: usize = 50;
/// Prompts that an engine is handed at a time, the most that one death can lose; a batch may be on its way.
const IN_FLIGHT: usize = 64;
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
    let beyond = history.check(broker);
    assert!(beyond <= KILLS * IN_FLIGHT, "{beyond} prompts were computed again");
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
    let beyond = history.check(&broker);
    assert!(beyond <= 5 * 400, "{beyond} prompts were computed again");
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
    history.check(broker);
}

#[test]
fn the_network_is_cut() {
    let broker = Broker::start(1);
    let proxy = Proxy::start(broker.proxies[0]);
    let address = format!("127.0.0.1:{}", broker.proxies[0].0);
    let mut history = History::new(&broker, &address, "cut", OPTIONS, "");
    history.feed(&broker, 3000);
    let (mut child, log) = history.start();
    let mut random = Random(3);
    for cut in 1..=6 {
        history.await_computed(&mut child, &log, cut * 150);
        std::thread::sleep(Duration::from_millis(random.below(50)));
        proxy.cut();
        let long = cut % 3 == 0;
        std::thread::sleep(Duration::from_millis(if long { 3000 } else { 100 + random.below(400) }));
        proxy.heal();
        history.note(if long { "cut for longer than the session" } else { "cut for a moment" });
    }
    history.await_computed(&mut child, &log, 1300);
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130), "{}", history.log(&log));
    history.finish();
    history.check(&broker);
}

/// A process that is stopped for longer than its session and its transaction comes back to a world in which both are
/// another's, and must commit nothing of what it held.
#[test]
fn a_zombie_is_fenced() {
    let broker = Broker::shared();
    let sink = ", transaction_timeout_ms: 1000, commit_ms: 10";
    let mut history = History::new(broker, broker.address(), "zombie", OPTIONS, sink);
    history.feed(broker, 3000);
    let (mut zombie, zombie_log) = history.start();
    for round in 1..=4 {
        history.await_computed(&mut zombie, &zombie_log, round * 100);
        signal(&zombie, "-STOP");
        history.note("a member is stopped");
        let (mut heir, heir_log) = history.start();
        history.await_computed(&mut heir, &heir_log, 100);
        signal(&zombie, "-CONT");
        history.note("the zombie comes back");
        history.await_computed(&mut heir, &heir_log, 160);
        signal(&heir, "-INT");
        assert_eq!(heir.wait().unwrap().code(), Some(130), "{}", history.log(&heir_log));
        history.note("its heir leaves");
    }
    signal(&zombie, "-INT");
    let code = zombie.wait().unwrap().code();
    assert_eq!(code, Some(130), "{}", history.log(&zombie_log));
    history.finish();
    history.check(broker);
}
