//! By which route a layered load goes, and how many layers one launch copies.

use super::device::STAGING_BYTES;
use super::route::{Route, Routes};

/// Time of the link in which the gap between two launches is lost, and by which the first layers
/// come later.
const LAUNCH_SECONDS: f64 = 1.5e-3;
/// Bytes that such a time is thought to be good for at most: as many as are staged at once.
const LAUNCH_BYTES_MAX: usize = STAGING_BYTES;
/// Time of a copy engine's command in which the eight microseconds matter little that each takes besides
/// its bytes (`docs/benchmarks.md`). It takes some of the launching thread's, too.
const COMMAND_SECONDS: f64 = 40e-6;
/// Launches that a load is made of all the same, if it has so many layers: the first layer waits for
/// the whole of the first.
const LAUNCHES_MIN: usize = 8;
/// What the thread that runs the model may spend on putting rows on the stream, in pieces: a few
/// milliseconds, less than what kernels, which reach all rows with one launch, cost a step.
const PIECES_MAX: usize = 4096;

/// The rows of a load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) count: usize,
    /// Groups of rows that lie next to each other.
    pub(super) runs: usize,
    /// What putting all of them on a stream costs whoever does it, in pieces of a call for many.
    pub(super) pieces: usize,
}

/// The launches of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Launches {
    pub(super) route: Route,
    /// Layers of each; the last may have fewer.
    pub(super) layers: usize,
}

impl Launches {
    /// Those of a load of `layers` layers, `layer_bytes` a row, where async loads reach `rate` bytes
    /// per second.
    pub(super) fn of(
        rows: Rows,
        layers: usize,
        layer_bytes: usize,
        routes: Routes,
        rate: Option<f64>,
    ) -> Self {
        let in_time = layers_in_time(rate, rows.count, layer_bytes);
        let in_commands = layers_a_command(rate, rows, layer_bytes, layers).max(in_time);
        let pieces = rows.pieces * layers.div_ceil(in_commands);
        let route = match routes.layered {
            Route::Staged(_) if pieces > PIECES_MAX => routes.scattered,
            route => route,
        };
        let layers = match route {
            Route::Staged(_) => in_commands,
            Route::Dma | Route::Kernel(_) => in_time,
        };
        Self { route, layers }
    }
}

/// Layers of `rows` rows that the link carries in the time of a launch.
pub(super) fn layers_in_time(rate: Option<f64>, rows: usize, layer_bytes: usize) -> usize {
    let in_time = bytes_in(LAUNCH_SECONDS, rate);
    (in_time.min(LAUNCH_BYTES_MAX) / (rows * layer_bytes).max(1)).max(1)
}

/// Layers that make a copy engine's command, which is for a run, large enough in the mean.
fn layers_a_command(rate: Option<f64>, rows: Rows, layer_bytes: usize, layers: usize) -> usize {
    let run_bytes = rows.count * layer_bytes / rows.runs.max(1);
    let wanted = bytes_in(COMMAND_SECONDS, rate).div_ceil(run_bytes.max(1));
    wanted.min(layers / LAUNCHES_MIN).max(1)
}

/// Bytes that the link carries in some time; none if its rate is not known.
fn bytes_in(seconds: f64, rate: Option<f64>) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a size of megabytes; a cast of floats saturates"
    )]
    rate.map_or(0, |rate| (rate * seconds) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGED: Route = Route::Staged(64);
    const KERNEL: Route = Route::Kernel(4);
    const KIB: usize = 1 << 10;

    fn routes(layered: Route, scattered: Route) -> Routes {
        Routes {
            save: STAGED,
            load: STAGED,
            layered,
            scattered,
        }
    }

    fn launches(count: usize, runs: usize, layers: usize, layer_bytes: usize) -> (Route, usize) {
        launches_at(50e9, count, runs, layers, layer_bytes)
    }

    fn launches_at(
        rate: f64,
        count: usize,
        runs: usize,
        layers: usize,
        layer_bytes: usize,
    ) -> (Route, usize) {
        let pieces = runs * (count / runs).min(4);
        let rows = Rows {
            count,
            runs,
            pieces,
        };
        let routes = routes(STAGED, KERNEL);
        let launches = Launches::of(rows, layers, layer_bytes, routes, Some(rate));
        (launches.route, launches.layers)
    }

    #[test]
    fn small_loads_take_few_launches_and_large_ones_one_a_layer() {
        assert_eq!(launches(4096, 1, 32, 64 * KIB), (STAGED, 1));
        assert_eq!(launches(256, 1, 32, 64 * KIB), (STAGED, 2));
        assert_eq!(launches(1, 1, 32, 64 * KIB), (STAGED, 512));
        assert_eq!(layers_in_time(Some(6e9), 64, 64 * KIB), 2, "a slow link");
        assert_eq!(layers_in_time(None, 1, 64 * KIB), 1);
    }

    #[test]
    fn rows_in_short_stretches_are_copied_several_layers_at_once() {
        assert_eq!(launches(512, 64, 32, 64 * KIB), (STAGED, 4));
        assert_eq!(launches(512, 64, 80, 32 * KIB), (STAGED, 8));
        assert_eq!(launches(512, 64, 3, 64 * KIB), (STAGED, 1), "few layers");
        assert_eq!(launches(256, 32, 32, 64 * KIB), (STAGED, 4));
        let slow = launches_at(6e9, 256, 32, 32, 64 * KIB);
        assert_eq!(slow, (STAGED, 1), "commands take long anyway");
    }

    #[test]
    fn rows_that_lie_apart_are_copied_by_kernels_where_they_are_many() {
        assert_eq!(launches(512, 512, 32, 64 * KIB), (STAGED, 4));
        assert_eq!(launches(513, 513, 32, 64 * KIB), (KERNEL, 1));
    }

    #[test]
    fn who_asks_for_a_route_gets_it_for_all_rows() {
        let rows = Rows {
            count: 1024,
            runs: 1024,
            pieces: 1024,
        };
        for (route, layers) in [(STAGED, 4), (Route::Dma, 1), (Route::Kernel(8), 1)] {
            let launches = Launches::of(rows, 32, 64 * KIB, routes(route, route), Some(50e9));
            assert_eq!(launches, Launches { route, layers });
        }
    }
}
