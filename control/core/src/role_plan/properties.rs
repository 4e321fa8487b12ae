//! What holds of rollouts whatever happens meanwhile: replicas cease to be ready and become so again, and
//! images never come up.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// The controller looks, and does what it plans.
    Look,
    /// What is going is gone.
    Confirm,
    /// One that is ready ceases to be.
    Flip(usize),
    /// All that served before are ready again.
    Recover,
    /// One of a good image becomes ready for the first time.
    Load(usize),
    /// Another number is wanted.
    Scale(i32),
}

#[derive(Clone, Debug)]
struct Pod {
    index: Option<i32>,
    revision: usize,
    served: bool,
    ready: bool,
    going: bool,
    created_s: i64,
    waiting_since_s: i64,
}

#[derive(Clone, Debug)]
struct World {
    replicas: i32,
    written: Budget,
    indexed: bool,
    /// Of each revision, whether its image comes up; the last is wanted.
    good: Vec<bool>,
    pods: Vec<Pod>,
    now_s: i64,
}

impl World {
    /// All of the first revision, which is good, and ready.
    fn new(replicas: i32, written: Budget, indexed: bool) -> Self {
        let pods = (0..replicas).map(|index| Pod {
            index: indexed.then_some(index),
            revision: 0,
            served: true,
            ready: true,
            going: false,
            created_s: i64::from(index),
            waiting_since_s: i64::from(index),
        });
        Self {
            replicas,
            written,
            indexed,
            good: vec![true],
            pods: pods.collect(),
            now_s: 100,
        }
    }

    fn view(&self) -> RoleView {
        let units = self.pods.iter().map(|pod| Replica {
            index: pod.index,
            updated: pod.revision + 1 == self.good.len(),
            state: match (pod.going, pod.ready) {
                (true, _) => ReplicaState::Going { overdue: false },
                (false, true) => ReplicaState::Ready,
                (false, false) => ReplicaState::Waiting,
            },
            created_s: pod.created_s,
            waiting_since_s: pod.waiting_since_s,
        });
        let Budget { surge, unavailable } = self.written;
        RoleView {
            replicas: self.replicas,
            budget: Budget {
                surge,
                unavailable: unavailable.min(self.replicas),
            },
            indexed: self.indexed,
            paused: false,
            units: units.collect(),
        }
    }

    /// Places where something is that `wanted` says.
    fn places(&self, wanted: impl Fn(&Pod) -> bool) -> i32 {
        let found = self.pods.iter().filter(|pod| !pod.going && wanted(pod));
        if self.indexed {
            let slots: std::collections::BTreeSet<_> = found.map(|pod| pod.index).collect();
            number(slots.len())
        } else {
            number(found.count())
        }
    }

    /// Whether it serves, or has served and is outdated.
    fn serves(&self, pod: &Pod) -> bool {
        pod.ready || pod.served && pod.revision + 1 < self.good.len()
    }

    /// Does what is planned, and sees that it keeps to the budget. Returns whether anything was done.
    fn look(&mut self) -> bool {
        let view = self.view();
        let mut plan = view.scale();
        if plan.is_empty() {
            plan = view.roll(None);
        }
        let floor = view.replicas - view.budget.unavailable;
        let ready = self.places(|pod| pod.ready);
        let served = self.places(|pod| self.serves(pod));
        let present = self.pods.len();
        for &at in &plan.delete {
            assert!(!self.pods[at].going, "deleted twice: {plan:?} of {self:?}");
            self.pods[at].going = true;
        }
        let left = self.places(|pod| pod.ready);
        assert!(
            left >= ready.min(floor),
            "{ready} to {left} ready: {plan:?} of {self:?}"
        );
        // An outdated one that was ready may be so again. Of updated ones that wait it is not known
        // whether they ever were. That of two broken images the right one goes cannot be asked for.
        let left = self.places(|pod| self.serves(pod));
        assert!(
            self.good.len() > 2 || left >= served.min(floor),
            "{served} to {left} that served: {plan:?} of {self:?}"
        );
        self.pods.extend(plan.create.iter().map(|&index| Pod {
            index,
            revision: self.good.len() - 1,
            served: false,
            ready: false,
            going: false,
            created_s: self.now_s,
            waiting_since_s: self.now_s,
        }));
        let most = usize::try_from(view.ceiling()).unwrap().max(present);
        assert!(
            self.pods.len() <= most,
            "beyond the surge: {plan:?} of {self:?}"
        );
        !plan.is_empty()
    }

    fn happen(&mut self, event: Event) {
        self.now_s += 1;
        match event {
            Event::Look => {
                self.look();
            }
            Event::Confirm => self.pods.retain(|pod| !pod.going),
            Event::Flip(nth) => {
                let mut ready: Vec<&mut Pod> =
                    self.pods.iter_mut().filter(|pod| pod.ready).collect();
                let count = ready.len().max(1);
                if let Some(pod) = ready.get_mut(nth % count) {
                    pod.ready = false;
                    pod.waiting_since_s = self.now_s;
                }
            }
            Event::Recover => {
                for pod in self.pods.iter_mut().filter(|pod| pod.served) {
                    pod.ready = true;
                }
            }
            Event::Load(nth) => {
                let good = &self.good;
                let coming = |pod: &&mut Pod| !pod.served && !pod.going && good[pod.revision];
                let mut coming: Vec<&mut Pod> = self.pods.iter_mut().filter(coming).collect();
                let count = coming.len().max(1);
                if let Some(pod) = coming.get_mut(nth % count) {
                    (pod.served, pod.ready) = (true, true);
                }
            }
            Event::Scale(replicas) if !self.indexed => self.replicas = replicas,
            Event::Scale(_) => {}
        }
    }

    /// Lets everything come to rest.
    fn settle(&mut self) {
        for _ in 0..200 {
            self.happen(Event::Recover);
            for _ in 0..self.pods.len() {
                self.happen(Event::Load(0));
            }
            self.happen(Event::Confirm);
            if !self.look() {
                return;
            }
        }
        panic!("no end: {self:?}");
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Look),
        3 => Just(Event::Confirm),
        4 => any::<usize>().prop_map(Event::Flip),
        2 => Just(Event::Recover),
        3 => any::<usize>().prop_map(Event::Load),
    ]
}

fn world() -> impl Strategy<Value = World> {
    let budget = (0..=2_i32, 0..=2_i32).prop_map(|(surge, unavailable)| Budget {
        surge,
        unavailable: if surge == 0 {
            unavailable.max(1)
        } else {
            unavailable
        },
    });
    (1..=5_i32, budget, any::<bool>())
        .prop_map(|(replicas, budget, indexed)| World::new(replicas, budget, indexed))
}

proptest! {
    #[test]
    fn a_good_image_arrives_whatever_flips_meanwhile(
        mut world in world(),
        events in prop::collection::vec(event(), 0..80),
    ) {
        world.good.push(true);
        events.into_iter().for_each(|event| world.happen(event));
        world.settle();
        prop_assert!(world.view().is_done(), "{world:?}");
    }

    #[test]
    fn a_bad_image_never_takes_more_than_the_budget_and_the_next_one_mends_it(
        mut world in world(),
        events in prop::collection::vec(event(), 0..80),
        later in prop::collection::vec(event(), 0..40),
        back in any::<bool>(),
    ) {
        world.good.push(false);
        events.into_iter().for_each(|event| world.happen(event));
        world.settle();
        let floor = world.replicas - world.view().budget.unavailable;
        prop_assert!(world.places(|pod| pod.ready) >= floor, "{world:?}");
        prop_assert!(!world.view().is_done(), "it cannot come up");
        world.good.push(true);
        if back {
            // To the first template: its replicas are the updated ones.
            let newest = world.good.len() - 1;
            let first = world.pods.iter_mut().filter(|pod| pod.revision == 0);
            first.for_each(|pod| pod.revision = newest);
        }
        later.into_iter().for_each(|event| world.happen(event));
        world.settle();
        prop_assert!(world.view().is_done(), "{world:?}");
    }

    #[test]
    fn a_number_that_changes_amid_a_rollout_takes_no_more_than_the_budget(
        mut world in world(),
        good in any::<bool>(),
        events in prop::collection::vec(
            prop_oneof![5 => event(), 1 => (0..=6_i32).prop_map(Event::Scale)], 0..80
        ),
    ) {
        world.good.push(good);
        events.into_iter().for_each(|event| world.happen(event));
        world.settle();
        prop_assert_eq!(world.view().is_done(), good || world.replicas == 0);
    }
}
