//! An order of steps in which each reads what no step before it overwrites.

use crate::image::delta::{Make, Step};

/// Puts `steps`, which are in the order of their blocks, in an order in which they can be done in
/// place: what reads the old disk first, each before whatever overwrites what it reads, then zeroes,
/// then what is stored.  Where steps wait for each other in a circle, the one of them that makes the
/// lowest block is stored instead.
pub(super) fn order(steps: &mut Vec<Step>) {
    let reading: Vec<usize> = (0..steps.len()).filter(|at| steps[*at].reads()).collect();
    let graph = Graph::new(steps, &reading);
    let (order, stored) = graph.sorted();
    for at in stored {
        steps[reading[at]].make = Make::Store;
    }
    let mut out: Vec<Step> = order.into_iter().map(|at| steps[reading[at]]).collect();
    for wanted in [Make::Zero, Make::Store] {
        out.extend(steps.iter().filter(|step| step.make == wanted));
    }
    *steps = out;
}

/// Steps that read the old disk.  Each reads one block, so it goes before one other step at most.
struct Graph {
    /// The step that overwrites what this one reads.
    next: Vec<Option<usize>>,
    /// How many steps go before this one.
    before: Vec<u32>,
}

impl Graph {
    fn new(steps: &[Step], reading: &[usize]) -> Self {
        let next: Vec<Option<usize>> = reading
            .iter()
            .map(|at| match steps[*at].make {
                Make::Copy(from) => reading
                    .binary_search_by_key(&from, |other| steps[*other].block)
                    .ok(),
                // What is at its own place.
                _ => None,
            })
            .collect();
        let mut before = vec![0; reading.len()];
        for next in next.iter().flatten() {
            before[*next] += 1;
        }
        Self { next, before }
    }

    /// All steps in order, and those that are to be stored instead, which are not among them.
    fn sorted(mut self) -> (Vec<usize>, Vec<usize>) {
        let (mut order, mut stored) = (Vec::with_capacity(self.next.len()), Vec::new());
        let mut is_done = vec![false; self.next.len()];
        let free: Vec<usize> = (0..self.next.len())
            .filter(|at| self.before[*at] == 0)
            .collect();
        for at in free {
            self.follow(at, &mut order, &mut is_done);
        }
        // What is left are circles and nothing else.
        for at in 0..self.next.len() {
            if is_done[at] {
                continue;
            }
            is_done[at] = true;
            stored.push(at);
            if let Some(next) = self.next[at] {
                self.before[next] -= 1;
                self.follow(next, &mut order, &mut is_done);
            }
        }
        (order, stored)
    }

    /// Does a step that nothing goes before any more, and all that only waited for that.
    fn follow(&mut self, first: usize, order: &mut Vec<usize>, is_done: &mut [bool]) {
        let mut at = Some(first);
        while let Some(now) = at.filter(|at| self.before[*at] == 0 && !is_done[*at]) {
            is_done[now] = true;
            order.push(now);
            at = self.next[now];
            if let Some(next) = at {
                self.before[next] -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_steps_are_ordered_so_that_none_reads_what_one_before_overwrites() {
        let mut rng = fastrand::Rng::with_seed(7);
        for round in 0..500 {
            let count = rng.u32(1..60);
            let mut steps = Vec::new();
            for block in 0..count {
                let from = match round % 3 {
                    0 => rng.u32(0..count),
                    1 => (block + 1) % count,
                    _ => block ^ 1,
                };
                let make = match rng.u32(0..8) {
                    0 => Make::Zero,
                    1 => Make::Store,
                    2 => Make::Differ,
                    _ if from == block => continue,
                    _ => Make::Copy(from),
                };
                steps.push(Step {
                    block,
                    blocks: 1,
                    make,
                });
            }
            let before = steps.clone();
            order(&mut steps);
            assert_eq!(steps.len(), before.len());
            let mut gone = std::collections::HashSet::new();
            let mut more = 0;
            for step in &steps {
                if let Make::Copy(from) = step.make {
                    assert!(!gone.contains(&from), "{steps:?}");
                }
                assert!(step.make != Make::Differ || !gone.contains(&step.block));
                assert!(gone.insert(step.block));
                let was = before.iter().find(|old| old.block == step.block);
                more += u32::from(was.expect("was there").make != step.make);
            }
            // A circle costs one step, not more.
            assert!(more <= count / 2);
        }
    }
}
